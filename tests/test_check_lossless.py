"""The check of a text against plain decoding, on a real local Ray: the same texts pass, changed ones do not."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from llmcad_actors import Engine
from llmcad_actors.actors.calls import fetch
from llmcad_actors.actors.lean_ray import LocalRay
from llmcad_actors.cli import runs as cli_runs
from llmcad_actors.cli.commands import app
from llmcad_actors.core.lossless import Difference, LosslessCheck
from llmcad_actors.core.trace import TraceBatch
from llmcad_actors.messages import unpack
from llmcad_actors.plan.job import Prepared
from llmcad_actors.results import Piece, Result
from tests.actors.engines import TEMPLATE, job
from tests.encoder_decoder_cases import CASES, plain_pair
from tests.plain import Plain, encode
from tests.tiny import PROMPTS, tiny_llama, with_template

COUNT = 24
AT = 7
PENALTY = 1.3
RULES = {"repetition_penalty": PENALTY, "suppress_tokens": [40, 41]}


@pytest.fixture(scope="module", autouse=True)
def local_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One Ray for all engines; they leave it alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMCAD_CACHE", str(tmp_path_factory.mktemp("cache")))  # for logs
        local = LocalRay(256 << 20)
        yield
        local.close()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """A random target with generation rules, and a draft that is right now and then."""
    folder = tmp_path_factory.mktemp("pair")
    target = with_template(tiny_llama(folder / "target", seed=1), TEMPLATE)
    settings = json.loads((target / "generation_config.json").read_text())
    (target / "generation_config.json").write_text(json.dumps(settings | RULES))
    draft = tiny_llama(folder / "draft", seed=1, dtype=torch.bfloat16)
    return job(target, draft, max_nodes=8, max_context=256, fallback="adaptive")  # drafts whether it pays or not


@pytest.fixture(scope="module")
def engine(pair: Prepared) -> Iterator[Engine]:
    with Engine.start(pair) as engine:
        yield engine


def tampered(result: Result, at: int, token: int) -> Result:
    return replace(result, token_ids=(*result.token_ids[:at], token, *result.token_ids[at + 1 :]))


@pytest.mark.parametrize("options", [{}, {"chat": True}, {"max_new_tokens": 5}, {"max_new_tokens": 10**6}], ids=str)
def test_a_text_that_is_the_targets_own_passes(engine: Engine, options: dict[str, Any]) -> None:
    options = {"max_new_tokens": COUNT} | options
    result = engine.generate(PROMPTS[0], **options)
    assert result.stats.tokens_per_pass > 1
    found = engine.check_lossless(result, PROMPTS[0], **options)
    assert found == LosslessCheck(len(result.token_ids), "float32")
    assert (found.is_same, found.holds) == (True, True)
    assert engine.stats.target_passes == len(result.token_ids)  # decoded one by one


def test_tokens_behind_a_stop_string_are_compared_too(engine: Engine) -> None:
    """A pass may bring more than the string: the text ends before it, the tokens go on."""
    whole = engine.generate(PROMPTS[0], max_new_tokens=COUNT)
    for middle in range(3, len(whole.text) - 3, 4):
        result = engine.generate(PROMPTS[0], max_new_tokens=COUNT, stop=whole.text[middle : middle + 2])
        assert result.finish_reason == "stop"
        assert engine.check_lossless(result, PROMPTS[0], max_new_tokens=COUNT).is_same
        changed = tampered(result, len(result.token_ids) - 1, 40)
        found = engine.check_lossless(changed, PROMPTS[0], max_new_tokens=COUNT)
        assert found.difference is not None
        assert found.difference.position == len(result.token_ids) - 1


def test_the_first_token_that_differs_is_told_with_the_targets_logits(engine: Engine) -> None:
    """Those that the choice saw: the repetition penalty is part of them."""
    result, path = engine.generate(PROMPTS[1], max_new_tokens=COUNT), engine.prepared.target.path
    right, wrong = result.token_ids[AT], (result.token_ids[AT] + 1) % 256
    found = engine.check_lossless(tampered(result, AT, wrong), PROMPTS[1], max_new_tokens=COUNT)
    assert found.difference is not None
    assert (found.num_tokens, found.difference.position, found.difference.token_ids) == (AT + 1, AT, (wrong, right))
    scores = penalized(Plain.of(path), (*encode(path, PROMPTS[1]), *result.token_ids[:AT]))
    assert found.difference.logits == pytest.approx([scores[wrong], scores[right]], rel=1e-4)
    assert not found.holds
    assert f"from token {AT + 1} on" in str(found)
    assert "must never happen" in str(found)


@torch.inference_mode()
def penalized(plain: Plain, ids: Sequence[int]) -> np.ndarray:
    logits: torch.Tensor = plain.model(torch.tensor([ids])).logits[0, -1]
    seen = torch.tensor(sorted(set(ids)))
    values = logits[seen]
    logits[seen] = torch.where(values < 0, values * PENALTY, values / PENALTY)
    return logits.numpy()


def test_a_token_that_the_rules_forbid_has_no_gap_and_json_can_say_so(engine: Engine) -> None:
    result = engine.generate(PROMPTS[0], max_new_tokens=COUNT)
    found = engine.check_lossless(tampered(result, 3, 41), PROMPTS[0], max_new_tokens=COUNT)
    assert not found.holds
    told = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert told["difference"]["logits"][0] is None
    assert told["difference"]["gap"] is told["difference"]["gap_in_steps"] is None
    assert told["difference"]["position"] == 3


def test_a_text_that_ends_too_early_does_not_pass(engine: Engine) -> None:
    result = engine.generate(PROMPTS[0], max_new_tokens=COUNT)
    short = replace(result, token_ids=result.token_ids[:9])
    found = engine.check_lossless(short, PROMPTS[0], max_new_tokens=COUNT)
    assert found.difference == Difference(9, (None, result.token_ids[9]), (None, found.difference.texts[1]), None)  # type: ignore[union-attr]
    assert not found.holds
    assert "the text's end" in str(found)


def test_the_engine_answers_as_before_afterwards(engine: Engine) -> None:
    """The check leaves rows of its own in the cache, cut off where the texts part."""
    before = engine.generate(PROMPTS[1], max_new_tokens=COUNT)
    engine.check_lossless(tampered(before, AT, 40), PROMPTS[1], max_new_tokens=COUNT)
    assert engine.generate(PROMPTS[1], max_new_tokens=COUNT).token_ids == before.token_ids


def test_the_prompt_is_computed_again_too(engine: Engine) -> None:
    """Rows that a tree's pass left behind might be what differs."""
    prompt = PROMPTS[2] * 3
    result = engine.generate(prompt, max_new_tokens=3)
    drained(engine)
    assert engine.check_lossless(result, prompt, max_new_tokens=3).is_same
    rows = drained(engine)
    assert len(rows) == 3
    assert rows[0] >= len(encode(engine.prepared.target.path, prompt)) > max(rows[1:])


def drained(engine: Engine) -> list[int]:
    """The rows of each pass since the last call, the first of which finds none."""
    batch: TraceBatch = unpack(fetch(engine._actors.verifier.trace.remote(True), 60, "the trace"))
    return [details["rows"] for name, _, _, details in batch.spans if name == "pass"]


def with_twins(path: Path, distance: float) -> Path:
    """Logits of the tokens 2k and 2k + 1 are the same, but for this share of them."""
    weights = load_file(path / "model.safetensors")
    head = weights["lm_head.weight"]
    head[1::2] = head[0 : len(head) - 1 : 2] * (1 - distance)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.mark.parametrize(("dtype", "distance"), [("float32", 0.0), ("bfloat16", 2**-10)])
def test_a_tie_up_to_rounding_passes_and_is_told(tmp_path: Path, dtype: str, distance: float) -> None:
    target = with_twins(tiny_llama(tmp_path / "target", seed=6), distance)
    with Engine.start(job(target, tiny_llama(tmp_path / "draft", seed=7, layers=1), dtype=dtype)) as engine:
        result = engine.generate(PROMPTS[0], max_new_tokens=COUNT)
        found = engine.check_lossless(tampered(result, AT, result.token_ids[AT] ^ 1), PROMPTS[0], max_new_tokens=COUNT)
    assert found.difference is not None
    assert found.difference.position <= AT  # in bfloat16 the texts may part before by themselves, at a tie
    assert found.holds
    assert "a tie" in str(found)
    assert found.as_dict()["holds"] is True


@pytest.mark.parametrize("logit", [-10.0, 0.75, 3000.0])
@pytest.mark.parametrize(
    ("dtype", "distance", "is_tie"),
    [("float32", 2**-19, True), ("float32", 2**-17, False), ("bfloat16", 2**-5, True), ("bfloat16", 2**-3, False)],
)
def test_what_is_a_tie_depends_on_the_type_that_is_computed_in(
    dtype: str, distance: float, is_tie: bool, logit: float
) -> None:
    found = LosslessCheck(4, dtype, Difference(3, (1, 2), ("a", "b"), (logit, logit * (1 - distance))))
    assert found.holds is is_tie
    assert ("a tie" in str(found), "must never happen" in str(found)) == (is_tie, not is_tie)
    assert found.as_dict()["holds"] is is_tie


def test_so_it_is_with_an_encoder_decoder(tmp_path: Path) -> None:
    """The prompt is no part of the decoder's text; a forced last token stands where it stood."""
    path = CASES["bart"].save(tmp_path / "target")
    with Engine.start(job(path, CASES["bart"].save(tmp_path / "draft", noise=0.01), max_context=128)) as engine:
        result = engine.generate(PROMPTS[0], max_new_tokens=COUNT)
        assert engine.check_lossless(result, PROMPTS[0], max_new_tokens=COUNT).is_same
        wrong = (result.token_ids[AT] + 1) % 256
        found = engine.check_lossless(tampered(result, AT, wrong), PROMPTS[0], max_new_tokens=COUNT)
    assert result.token_ids == plain_pair(path).greedy(encode(path, PROMPTS[0]), COUNT)
    assert found.difference is not None
    assert (found.difference.position, found.holds) == (AT, False)


class Tampering(Engine):
    """An engine whose texts have a token that the target did not say."""

    def result(self, pieces: Sequence[Piece]) -> Result:
        return tampered(super().result(pieces), AT, 40)


def llmcad(pair: Prepared, *options: str) -> Any:
    paths = ("--target", str(pair.target.path), "--draft", str(pair.draft.path if pair.draft else "none"))
    words = (
        "--fallback",
        "adaptive",
        "--memory",
        "2GB",
        "--max-context",
        "256",
        "--max-new-tokens",
        str(COUNT),
        *options,
    )
    return CliRunner().invoke(app, ["generate", *paths, *words, "--check-lossless", "--", PROMPTS[0]])


def test_the_command_says_that_the_texts_are_the_same(pair: Prepared) -> None:
    done = llmcad(pair, "--chat", "--stop", "qqqqqq")
    assert done.exit_code == 0, done.stderr
    assert done.stderr.splitlines()[-1] == f"checked: decoded plainly, the text is the same ({COUNT} tokens)"


def test_the_object_of_texts_that_are_the_same() -> None:
    same = {"same": True, "holds": True, "num_tokens": COUNT, "dtype": "float32", "difference": None}
    assert LosslessCheck(COUNT, "float32").as_dict() == same


def test_the_command_fails_where_they_differ(pair: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_runs, "Engine", Tampering)
    done = llmcad(pair, "--quiet", "--json")
    assert done.exit_code == 1, done.stderr
    assert f"THE TEXTS DIFFER from token {AT + 1} on: " in done.stderr.splitlines()[-1]
    found = json.loads(done.stdout)["lossless"]
    assert (found["same"], found["holds"], found["difference"]["position"]) == (False, False, AT)


def test_without_a_draft_there_is_nothing_to_compare(pair: Prepared) -> None:
    done = llmcad(pair, "--draft", "none")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "--check-lossless decodes again without the draft, and there is none" in done.stderr.splitlines()[-1]
