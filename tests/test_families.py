"""Every family, as target and as draft: its output is transformers' own greedy generation, token for token."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from llmcad_actors import Engine
from llmcad_actors.config import EngineConfig
from llmcad_actors.core.costs import CostModel
from llmcad_actors.core.fallback import FixedTree
from llmcad_actors.core.fixed_expansion import FixedExpansion
from llmcad_actors.core.round import Verdict
from llmcad_actors.core.tree import TokenTree
from llmcad_actors.errors import CheckpointError, ConfigError
from llmcad_actors.models.draft import Draft, DraftModel
from llmcad_actors.models.masks import SLIDING, SlidingWindows
from llmcad_actors.plan.prepare import prepare
from tests.fakes import OneDraft, tokens_to
from tests.family_cases import CASES, EXPERTS, GROUPED, IDS, LONGROPE, WINDOW, Case
from tests.models.checkpoints import target_of
from tests.plain import Plain, encode
from tests.streamed import Streaming, half_streamed
from tests.test_lossless import local
from tests.tiny import BYTE_VOCAB, PROMPTS, tiny_llama

COUNT = 40
NOISE = 0.02
TEXTS = (*PROMPTS[:2], "for name in sorted(os.listdir(folder)):\n    print(name)\n")
WINDOWED = [name for name, case in CASES.items() if case.window]
ONE_EACH = list({case.model_type: name for name, case in CASES.items()}.values())
EDGE = tuple(range(WINDOW - 2, WINDOW + 3))
"""Lengths of text at which a tree's first nodes leave the window."""


class Saved:
    """A folder of checkpoints, made when they are first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.target = cache(self._target)
        self.noisy = cache(self._noisy)
        self.llama = cache(self._llama)

    def _target(self, name: str) -> Path:
        return CASES[name].save(self.folder / name)

    def _noisy(self, name: str) -> Path:
        """The target with noise on its weights: a draft that is right now and then."""
        return CASES[name].save(self.folder / f"{name} noisy", noise=NOISE)

    def _llama(self) -> Path:
        return tiny_llama(self.folder / "random llama", seed=9, layers=1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Saved]:
    yield Saved(tmp_path_factory.mktemp("families"))


@cache
def greedy(path: Path, ids: tuple[int, ...]) -> tuple[int, ...]:
    """What transformers makes of a prompt."""
    return Plain.of(path).greedy(ids, COUNT)


@pytest.fixture(scope="module")
def streaming() -> Iterator[Streaming]:
    """One Ray and one loader process for all cases."""
    streaming = Streaming()
    yield streaming
    streaming.close()


@pytest.mark.parametrize("name", CASES)
def test_streamed_the_output_is_greedy_generation_with_a_draft_of_the_family(
    saved: Saved, streaming: Streaming, name: str
) -> None:
    """At least half of the layers are read from disk in every pass."""
    path = saved.target(name)
    engine = streaming.local(path, saved.noisy(name), max_nodes=8, fallback="fixed-tree", widths=(2, 1, 2))
    passes = tokens = 0
    for text in TEXTS:
        ids = encode(path, text)
        found, stats = engine.generate(ids, COUNT, provisional=False)
        assert found == greedy(path, ids)
        passes, tokens = passes + stats.target_passes, tokens + len(found)
    assert tokens == len(TEXTS) * COUNT
    assert streaming.bytes_read() >= passes * engine.job.memory.bytes_per_pass > 0
    assert tokens > 1.3 * passes or "equal logits" in name  # there the draft cannot know which is the first


@pytest.mark.parametrize("name", ONE_EACH)
def test_so_it_is_with_a_random_draft_of_another_family(saved: Saved, streaming: Streaming, name: str) -> None:
    path = saved.target(name)
    engine = streaming.local(path, saved.llama(), max_nodes=3, fallback="fixed-tree", widths=(3,))
    ids = encode(path, TEXTS[-1])
    found, stats = engine.generate(ids, COUNT, provisional=False)
    assert found == greedy(path, ids)
    assert stats.verified_nodes > 0


@pytest.mark.parametrize("name", CASES)
def test_a_draft_proposes_what_its_model_says(saved: Saved, name: str) -> None:
    """Node by node, also where branches leave a window."""
    path = saved.target(name)
    plain = Plain.of(path)
    model = DraftModel(path, dtype=torch.float32, vocab=BYTE_VOCAB, rows=128, slots=64, children=4)
    draft = OneDraft(Draft(model, FixedExpansion((2, 2, 2, 1), batch=3), batch=3, max_positions=128))
    for length in (EDGE[0], EDGE[-1], 3 * WINDOW) if CASES[name].window else (3 * WINDOW,):
        prompt = random_ids(length, seed=length)
        draft.begin(prompt)
        tree = draft.grow((), FixedTree(), CostModel().costs()).tree
        assert len(tree) == 2 + 4 + 8 + 8
        for node in range(len(tree)):
            said = plain.logprobs((*prompt, *tokens_to(tree, int(tree.parents[node]))))
            assert tree.logprobs[node] == pytest.approx(said[tree.tokens[node]], abs=2e-4)


@pytest.mark.parametrize("name", CASES)
def test_trees_of_any_shape_are_judged_as_the_plain_model_does(saved: Saved, name: str) -> None:
    """Branches at the window's edge, and a prompt longer than the window."""
    path = saved.target(name)
    plain, (target, _) = Plain.of(path), target_of(path)
    for length in (*EDGE, 2 * WINDOW + 1) if CASES[name].window else (2 * WINDOW + 1,):
        committed = random_ids(length, seed=length)
        target.begin(committed, ())
        for seed in range(2):
            tree = half_right(plain, committed, seed)
            expected, verdict = plain.judge(tree, committed), target.verify(tree)
            assert (verdict.path, verdict.bonus) == (expected.path, expected.bonus)
            committed = (*committed, *expected.emitted(tree))


@pytest.mark.parametrize("name", WINDOWED)
def test_a_tree_may_be_deeper_than_the_window(saved: Saved, name: str) -> None:
    """Its rows and its positions are far apart there."""
    path = saved.target(name)
    plain, (target, _) = Plain.of(path), target_of(path)
    committed, tree, parent = random_ids(WINDOW // 2, seed=1), TokenTree.empty(), -1
    for right in plain.continuation(committed, 2 * WINDOW):
        tree = tree.extended([parent] * 2, [(right + 1) % BYTE_VOCAB, right], [-1.0, -0.5])
        parent = len(tree) - 1
    target.begin(committed, ())
    expected, verdict = plain.judge(tree, committed), target.verify(tree)
    assert (verdict.path, verdict.bonus) == (expected.path, expected.bonus)
    assert len(verdict.path) == 2 * WINDOW


@pytest.mark.parametrize("name", WINDOWED)
def test_so_may_a_drafts_and_what_was_committed_keeps_its_positions(saved: Saved, name: str) -> None:
    path = saved.target(name)
    plain, rng = Plain.of(path), np.random.default_rng(1)
    model = DraftModel(path, dtype=torch.float32, vocab=BYTE_VOCAB, rows=256, slots=128, children=4)
    draft = OneDraft(Draft(model, FixedExpansion((2, *[1] * (WINDOW + 3)), batch=4), batch=4, max_positions=192))
    committed, verdicts = random_ids(WINDOW, seed=2), tuple[Verdict, ...]()
    draft.begin(committed)
    for turn in range(4):
        tree = draft.grow(verdicts, FixedTree(), CostModel().costs()).tree
        assert max(tree.depths) > WINDOW
        for node in (len(tree) - 1, *rng.choice(len(tree), 6)):
            said = plain.logprobs((*committed, *tokens_to(tree, int(tree.parents[node]))))
            assert tree.logprobs[node] == pytest.approx(said[tree.tokens[node]], abs=2e-4)
        branch = tree.path(len(tree) - 1)
        accepted, following = branch[: 7 + turn], branch[7 + turn]
        bonus = int(tree.tokens[following]) if turn % 2 else int(rng.integers(1, BYTE_VOCAB))
        verdicts = (Verdict(tuple(accepted), bonus, False),)
        committed = (*committed, *tokens_to(tree, accepted[-1]), bonus)


@pytest.mark.parametrize("name", WINDOWED)
def test_a_window_changes_what_the_model_says(saved: Saved, name: str) -> None:
    """A window that is missing, or one position off, is not what transformers computes."""
    plain, text = Plain.of(saved.target(name)), random_ids(3 * WINDOW, seed=1)
    said = plain.logprobs(text)
    assert with_window(plain, WINDOW, text) == pytest.approx(said, abs=2e-4)
    for window in (WINDOW + 1, WINDOW - 1, 10**6):
        assert np.abs(with_window(plain, window, text) - said).max() > 1e-2 or "equal logits" in name


def with_window(plain: Plain, window: int, text: tuple[int, ...]) -> np.ndarray:
    """Log-probabilities of the next token, had the model that window."""
    positions = np.arange(len(text))
    causal = torch.full((len(text), len(text)), torch.finfo(torch.float32).min).triu_(1)[None, None]
    by_layer_type = SlidingWindows.of(plain.model.config).by_layer_type
    masks = SlidingWindows(window, by_layer_type).masks(causal, positions, positions)
    with torch.inference_mode():
        logits = plain.model(torch.tensor([text]), attention_mask=masks).logits[0, -1]
    return np.asarray(logits.log_softmax(-1))


def random_ids(length: int, seed: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(1, BYTE_VOCAB, length).tolist())


def half_right(plain: Plain, committed: tuple[int, ...], seed: int) -> TokenTree:
    """A tree of 10 nodes at most: a right chain to grow from, with branches anywhere."""
    rng, tree = np.random.default_rng(seed), TokenTree.empty()
    for size in range(10):
        parent = size - 1 if size < 4 else int(rng.integers(-1, len(tree)))
        right = plain.next((*committed, *tokens_to(tree, parent)))
        token = right if size < 4 or rng.random() < 0.5 else int(rng.integers(1, BYTE_VOCAB))
        if tree.child(parent, token) is None:
            tree = tree.extended([parent], [token], [-0.5])
    return tree


def test_a_window_counts_positions_not_rows() -> None:
    """Two siblings stand side by side at one position; the window of a node is its depth's."""
    positions = np.array([3, 4, 4, 5])
    mask = torch.zeros(1, 1, 4, 7)
    masks = SlidingWindows(3, by_layer_type=True).masks(mask, positions, np.array([0, 1, 2, *positions]))
    assert isinstance(masks, dict)
    seen = masks[SLIDING][0, 0] == 0
    assert [row.tolist() for row in seen.int()] == [
        [0, 1, 1, 1, 1, 1, 1],
        [0, 0, 1, 1, 1, 1, 1],
        [0, 0, 1, 1, 1, 1, 1],
        [0, 0, 0, 1, 1, 1, 1],
    ]


@pytest.mark.parametrize("name", ["llama, rope dynamic", "gpt2", "opt", "gptj"])
def test_a_text_may_fill_the_context(saved: Saved, name: str, tmp_path: Path) -> None:
    """Positions end there: no node of a tree may stand beyond, not even one that comes to nothing."""
    case = Case(CASES[name].model_type, CASES[name].fields | {"max_position_embeddings": 64})
    path = case.save(tmp_path)
    ids = random_ids(30, seed=1)
    engine = local(path, path, max_nodes=8, fallback="fixed-depth", depth=8)
    assert engine.generate(ids, 64 - len(ids), provisional=False)[0] == Plain(path).greedy(ids, 64 - len(ids))


@pytest.mark.parametrize(
    ("case", "what"),
    [
        (Case("falcon", IDS | {"hidden_size": 48, "num_attention_heads": 6, "alibi": True}), "sets alibi: attention"),
        (Case("gemma2", GROUPED | {"use_bidirectional_attention": True}), "sets use_bidirectional_attention: tokens"),
        (Case("qwen3_moe", EXPERTS | {"mlp_only_layers": [1]}), "sets mlp_only_layers: some layers have no"),
        (Case("qwen2_moe", EXPERTS | {"decoder_sparse_step": 2}), "sets decoder_sparse_step: some layers have no"),
        (
            Case("mamba", {"hidden_size": 32}),
            "'mamba', which llmcad does not know; known architectures: bart, falcon, gemma",
        ),
    ],
)
def test_what_cannot_be_run_right_is_refused(case: Case, what: str, tmp_path: Path) -> None:
    AutoConfig.for_model(case.model_type, **case.fields).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((tiny_llama(tmp_path / "any") / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=what):
        prepare(EngineConfig(target=str(tmp_path), draft=None, memory="8GB"))


def test_a_text_that_would_turn_its_positions_otherwise_is_refused(saved: Saved) -> None:
    """ "longrope" changes the cached positions too, once a text passes its first length."""
    path = str(saved.target("phi3, longrope"))
    assert LONGROPE["rope_type"] == "longrope"
    assert prepare(EngineConfig(target=path, draft=None, memory="8GB")).context == 128
    with pytest.raises(ConfigError, match="129 is more than the target's context of 128"):
        prepare(EngineConfig(target=path, draft=None, memory="8GB", max_context=129))


@pytest.mark.parametrize("name", ["gemma2", "mixtral"])
def test_a_whole_engine_says_the_same(saved: Saved, streaming: Streaming, name: str) -> None:
    """Two starts, which take ten times as long as a case above: windows with soft-capping and a tied head; experts.

    What an engine adds to the cases above, the draft and the loop as processes, knows nothing of families.
    """
    path = saved.target(name)
    prepared = half_streamed(path, saved.noisy(name), max_nodes=8, fallback="adaptive", dtype="float32")
    with Engine.start(prepared) as engine:
        for text in TEXTS:
            result = engine.generate(text, max_new_tokens=COUNT)
            assert result.token_ids == greedy(path, encode(path, text))
        assert engine.stats.spilled_bytes == 0
