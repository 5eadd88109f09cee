"""The decode loop over the real models, in this process: speculation never changes the output."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from llmcad_actors.config import EngineConfig
from llmcad_actors.core.builders import make_builder
from llmcad_actors.core.costs import CostModel
from llmcad_actors.core.fallback import Policy
from llmcad_actors.core.request import Request
from llmcad_actors.core.rounds import Rounds
from llmcad_actors.core.stats import Stats
from llmcad_actors.messages import Event, Finished, Tokens
from llmcad_actors.models.draft import Draft, DraftModel
from llmcad_actors.models.target import Target
from llmcad_actors.plan.job import Prepared
from llmcad_actors.plan.prepare import prepare
from llmcad_actors.plan.specs import draft_spec, policy_of, verifier_spec
from llmcad_actors.ports import Verifier
from llmcad_actors.tools.bundled import bundled_draft, bundled_target
from tests.fakes import LocalDrafter, LocalVerifier, MemoryShards, Scripted, TickingClock, decode
from tests.plain import Plain, encode
from tests.tiny import BYTE_VOCAB, tiny_llama

PROMPTS = (
    "import json\n\n\ndef load(path):\n    ",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "for name in sorted(os.listdir(folder)):\n",
    "x",
)
COUNT = 64
FEW = 32  # of a random draft's tokens hardly any are right: as many passes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """untied, tied: random targets. rnd: a random draft of theirs. far: of the bundled target."""
    folder = tmp_path_factory.mktemp("lossless")
    tiny_llama(folder / "untied", seed=1)
    tiny_llama(folder / "tied", seed=2, tied=True, max_file="40KB")
    tiny_llama(folder / "random", seed=3, layers=1)
    tiny_llama(folder / "short", seed=1, context=40)  # the untied target, but made for less context
    tiny_llama(folder / "padded", seed=4, vocab=320)
    tiny_llama(folder / "far", seed=5, vocab=4096, layers=1, tokenizer_of=bundled_draft())
    return folder


class Local:
    """A job's draft and the loop, in this process, and the verifier that it is given."""

    def __init__(self, job: Prepared, verifier: Verifier) -> None:
        self.job = job
        self.verifier = verifier
        self.drafter = self._drafter()

    def _drafter(self) -> LocalDrafter | None:
        spec = draft_spec(self.job)
        if spec is None:
            return None
        model = DraftModel(
            Path(spec.path),
            dtype=torch.float32,
            vocab=spec.vocab,
            rows=spec.rows,
            slots=spec.slots,
            children=spec.children,
        )
        builder = make_builder(
            spec.builder,
            max_nodes=spec.max_nodes,
            batch=spec.batch,
            children=spec.children,
            widths=spec.widths,
            sharpens=spec.sharpens,
        )
        return LocalDrafter(
            Draft(model, builder, batch=spec.batch, max_positions=spec.context, max_nodes=spec.max_nodes)
        )

    def generate(
        self, prompt: Sequence[int], count: int = COUNT, *, provisional: bool = True, policy: Policy | None = None
    ) -> tuple[tuple[int, ...], Stats]:
        events: list[Event] = []
        request = Request(tuple(prompt), count, self.job.stop_tokens, provisional=provisional)
        learnt, clock = Rounds(policy or policy_of(self.job), CostModel()), TickingClock()
        asyncio.run(decode(request, self.drafter, self.verifier, learnt, clock, events.append))
        assert isinstance(events[-1], Finished)
        ids = tuple(token for event in events if isinstance(event, Tokens) for token in event.ids)
        return ids, events[-1].stats


def local(target: Path, draft: Path | None, **settings: object) -> Local:
    """A job without actors; all weights are in memory."""
    config = EngineConfig(
        target=str(target),
        draft=None if draft is None else str(draft),
        memory="8GB",
        dtype="float32",
        **settings,  # type: ignore[arg-type]
    )
    job = prepare(config)
    spec, shards = verifier_spec(job), MemoryShards(job.layout)
    model = Target(
        job.target, job.layout, shards, dtype=torch.float32, capacity=spec.capacity, max_nodes=spec.max_nodes
    )
    return Local(job, LocalVerifier(model))


@pytest.mark.parametrize("target", ["untied", "tied"])
@pytest.mark.parametrize("draft", ["untied", "tied", "random", "short", "padded", None])
def test_a_random_targets_output_is_greedy_generation_whatever_the_draft(
    folder: Path, target: str, draft: str | None
) -> None:
    plain = Plain.of(folder / target)
    engine = local(folder / target, folder / draft if draft else None, max_nodes=24, fallback="adaptive")
    for prompt, provisional in zip(PROMPTS, (True, False), strict=False):
        ids = encode(folder / target, prompt)
        found, stats = engine.generate(ids, FEW, provisional=provisional)
        assert found == plain.greedy(ids, FEW)
        if draft == target:
            assert stats.tokens_per_pass > 2


@pytest.mark.parametrize("draft", ["untied", "random", "short"])
def test_so_it_is_when_the_draft_is_left_out_of_passes_at_random(folder: Path, draft: str) -> None:
    plain, engine = Plain.of(folder / "untied"), local(folder / "untied", folder / draft, max_nodes=4)
    passes, undrafted = 0, 0
    for seed, prompt in enumerate(PROMPTS[:3]):
        ids, rng = encode(folder / "untied", prompt), np.random.default_rng(seed)
        drafts = tuple(np.repeat(rng.random(COUNT) < 0.5, rng.integers(1, 5, COUNT)).tolist())
        found, stats = engine.generate(ids, COUNT, policy=Scripted(0.02, drafts=drafts))
        assert found == plain.greedy(ids, COUNT)
        passes, undrafted = passes + stats.target_passes, undrafted + stats.undrafted_passes
    assert 0.1 * passes < undrafted < 0.9 * passes


@pytest.mark.parametrize("prompt", PROMPTS[:4])
def test_the_bundled_pairs_output_is_greedy_generation(pair: Local, prompt: str) -> None:
    ids = encode(bundled_target(), prompt)
    found, stats = pair.generate(ids)
    assert found == Plain.of(bundled_target()).greedy(ids, COUNT)
    assert stats.tokens_per_pass > 2


@pytest.fixture(scope="module")
def pair() -> Local:
    return local(bundled_target(), bundled_draft(), max_nodes=64, fallback="adaptive")


@pytest.mark.parametrize("draft", ["far", None])
def test_so_it_is_with_a_random_draft_and_with_none(folder: Path, draft: str | None) -> None:
    engine = local(bundled_target(), folder / draft if draft else None, max_nodes=16)
    ids = encode(bundled_target(), PROMPTS[0])
    found, stats = engine.generate(ids)
    assert found == Plain.of(bundled_target()).greedy(ids, COUNT)
    assert stats.target_passes > COUNT // 2


@pytest.mark.parametrize(
    "settings",
    [
        {"builder": "pacer"},
        {"fallback": "fixed-depth", "depth": 3},
        {"fallback": "fixed-tree", "widths": (2, 2, 1)},
        {"fallback": "token-confidence"},
        {"fallback": "marginal"},
        {"max_nodes": 1},
        {"max_nodes": 300, "batch": 64},
    ],
    ids=str,
)
def test_no_setting_changes_the_output(folder: Path, settings: dict[str, object]) -> None:
    engine = local(folder / "untied", folder / "short", **settings)
    ids = encode(folder / "untied", PROMPTS[1])
    assert engine.generate(ids, FEW)[0] == Plain.of(folder / "untied").greedy(ids, FEW)


def test_one_engine_answers_request_after_request(folder: Path) -> None:
    """Prompts that share beginnings, and one that goes on from an answer."""
    engine, plain = local(folder / "tied", folder / "random", max_nodes=8), Plain.of(folder / "tied")
    ids = encode(folder / "tied", PROMPTS[1])
    answer = plain.greedy(ids, FEW)
    for prompt in (ids, ids[:-3], ids, (*ids, *answer[:20]), ids[:5]):
        assert engine.generate(prompt, FEW)[0] == plain.greedy(prompt, FEW)


def test_a_padded_target_may_say_ids_that_its_draft_does_not_have(folder: Path) -> None:
    """The other way round is among the drafts above: `padded`."""
    plain, prompt = Plain.of(folder / "padded"), encode(folder / "padded", PROMPTS[0])
    engine = local(folder / "padded", folder / "untied", max_nodes=24, fallback="adaptive")
    expected = plain.greedy(prompt, FEW)
    assert max(expected) >= BYTE_VOCAB
    assert engine.generate(prompt, FEW)[0] == expected
