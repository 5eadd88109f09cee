"""What a target's generation config asks for is followed, as `generate(do_sample=False)` follows it."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from llmcad_actors.config import EngineConfig
from llmcad_actors.core.acceptance import walk
from llmcad_actors.core.tree import TokenTree
from llmcad_actors.errors import CheckpointError
from llmcad_actors.models.processors import PathChoices
from llmcad_actors.plan.footprint import MAX_REQUESTS, WHOLE_LOGITS_BYTES, whole_rows
from llmcad_actors.plan.prepare import prepare
from tests.fakes import chain
from tests.models.checkpoints import target_of
from tests.plain import Plain, encode
from tests.test_lossless import local
from tests.tiny import PROMPTS, tiny_llama

COUNT = 32
PROMPT = PROMPTS[0]
PROMPT_ID, FORCED = 40, 9
OFTEN = 75  # what the target says again and again after the prompt, from its 4th token on

RULES: dict[str, dict[str, Any]] = {
    "repetition_penalty": {"repetition_penalty": 1.3},
    "repetition reward": {"repetition_penalty": 0.8},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "bad_words_ids": {"bad_words_ids": [[238], [OFTEN, OFTEN, OFTEN]]},
    "bad_words_ids, one of them an end": {"bad_words_ids": [[0], [OFTEN, OFTEN]], "eos_token_id": [0]},
    "min_length": {"min_length": len(PROMPT) + 9, "eos_token_id": OFTEN},
    "min_new_tokens": {"min_new_tokens": 9, "eos_token_id": [OFTEN, 181]},
    "min_new_tokens in place of min_length": {"min_new_tokens": 5, "min_length": 200, "eos_token_id": OFTEN},
    "forced_eos_token_id": {"forced_eos_token_id": 0},
    "forced_eos_token_id that ends nothing": {"forced_eos_token_id": [5, 7]},
    "suppress_tokens": {"suppress_tokens": [OFTEN, 173]},
    "begin_suppress_tokens": {"begin_suppress_tokens": [238]},
    "all": {
        "repetition_penalty": 1.1,
        "no_repeat_ngram_size": 3,
        "bad_words_ids": [[238, 173]],
        "min_new_tokens": 20,
        "forced_bos_token_id": 9,
        "forced_eos_token_id": 0,
        "suppress_tokens": [OFTEN],
        "begin_suppress_tokens": [173],
        "eos_token_id": [118, 208],
    },
}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random target that repeats itself."""
    return tiny_llama(tmp_path_factory.mktemp("target"), seed=1, spread=0.1)


def with_settings(target: Path, folder: Path, settings: dict[str, Any]) -> Path:
    """The same model with these settings as its generation config."""
    folder.mkdir()
    for source in target.iterdir():
        if source.name != "generation_config.json":
            (folder / source.name).symlink_to(source)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0} | settings))
    return folder


def followed(model: Path, draft: Path | None, prompt: tuple[int, ...], folder: Path) -> None:
    """Output and reference are the same, and not the reference that only ends where this one ends."""
    expected = Plain.of(model).greedy(prompt, COUNT)
    settings = json.loads((model / "generation_config.json").read_text())
    bare = with_settings(model, folder / "bare", {"eos_token_id": settings["eos_token_id"]})
    assert expected != Plain.of(bare).greedy(prompt, COUNT)
    engine = local(model, draft, max_nodes=24, fallback="fixed-tree", widths=(3, 2, 1, 1))
    found, stats = engine.generate(prompt, COUNT)
    assert found == expected
    assert draft is None or stats.accepted_tokens > 0


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_changes_the_output_as_it_changes_plain_generation(target: Path, tmp_path: Path, rule: str) -> None:
    model = with_settings(target, tmp_path / "model", RULES[rule])
    followed(model, target, encode(target, PROMPT), tmp_path)


@pytest.mark.parametrize("rule", ["forced_bos_token_id", "begin_suppress_tokens"])
def test_a_prompt_of_one_token_begins_as_the_rules_say(target: Path, tmp_path: Path, rule: str) -> None:
    """A forced first token moves the beginning on by one."""
    second = Plain.of(target).continuation((PROMPT_ID, FORCED), 1)
    rules = {"forced_bos_token_id": FORCED} | ({} if rule == "forced_bos_token_id" else {rule: list(second)})
    model = with_settings(target, tmp_path / "model", rules)
    followed(model, target, (PROMPT_ID,), tmp_path)
    assert Plain.of(model).greedy((PROMPT_ID,), 1) == (FORCED,)


def test_rules_are_followed_without_a_draft(target: Path, tmp_path: Path) -> None:
    model = with_settings(target, tmp_path / "model", RULES["all"])
    followed(model, None, encode(target, PROMPT), tmp_path)


def test_request_after_request_has_its_own_lengths(target: Path, tmp_path: Path) -> None:
    model = with_settings(target, tmp_path / "model", RULES["all"])
    engine, prompt = local(model, target, max_nodes=24, fallback="adaptive"), encode(target, PROMPT)
    for ids, count in ((prompt, 30), (prompt[:4], 24), ((*prompt, 3, 4), 26)):
        assert engine.generate(ids, count)[0] == Plain.of(model).greedy(ids, count)


def test_rules_hold_where_the_head_comes_in_slices(target: Path, tmp_path: Path) -> None:
    model = with_settings(target, tmp_path / "model", RULES["all"])
    sliced, _ = target_of(model, max_shard_bytes=5000)
    assert len(sliced.layout.head) > 5
    prompt = encode(target, PROMPT)
    expected = Plain.of(model).greedy(prompt, COUNT)
    sliced.begin(prompt, (118, 208), COUNT)
    found = [sliced.verify(chain(expected[:3]))]
    assert found[0].path == (0, 1, 2)
    while not found[-1].stopped and len(found) + 3 < COUNT:
        found.append(sliced.verify(TokenTree.empty()))
    assert (*expected[:3], *(verdict.bonus for verdict in found)) == expected


def test_the_processors_run_for_the_accepted_path_alone(target: Path) -> None:
    """A node off the path may have no sensible processing at all."""
    asked: list[int] = []

    class Noting(LogitsProcessor):  # type: ignore[misc]
        def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
            asked.append(input_ids.shape[-1])
            return scores

    tree = TokenTree.build([1, 2, 3, 4], [-1, -1, 0, 2], [-1.0] * 4)
    logits = torch.nn.functional.one_hot(torch.tensor([1, 3, 9, 8, 8]), 10).bfloat16()
    choices = PathChoices(logits, LogitsProcessorList([Noting()]), (7, 7), tree)
    assert walk(tree, choices, frozenset()).path == (0, 2)
    assert asked == [2, 3, 4]


def test_without_a_generation_config_the_model_config_speaks(target: Path, tmp_path: Path) -> None:
    """As older models have it."""
    model = Path(shutil.copytree(target, tmp_path / "model"))
    (model / "generation_config.json").unlink()
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"no_repeat_ngram_size": 2, "eos_token_id": 118}))
    prompt = encode(target, PROMPT)
    expected = Plain.of(model).greedy(prompt, COUNT)
    assert expected != Plain.of(target).greedy(prompt, COUNT)
    assert local(model, target, max_nodes=24).generate(prompt, COUNT)[0] == expected


NEVER = 200  # what the target does not say


@pytest.mark.parametrize("ends", [[NEVER, OFTEN], [OFTEN, NEVER], [NEVER, NEVER + 1, OFTEN, 0]], ids=str)
@pytest.mark.parametrize("has_draft", [True, False])
def test_any_of_several_ids_ends_the_text(target: Path, tmp_path: Path, ends: list[int], has_draft: bool) -> None:
    model, prompt = with_settings(target, tmp_path / "model", {"eos_token_id": ends}), encode(target, PROMPT)
    expected = Plain.of(model).greedy(prompt, COUNT)
    assert len(expected) < COUNT
    assert expected[-1] == OFTEN
    assert local(model, target if has_draft else None, max_nodes=24).generate(prompt, COUNT)[0] == expected


@pytest.mark.parametrize("settings", [{}, {"transformers_version": "4.30.0"}, {"eos_token_id": None}], ids=str)
def test_a_generation_config_that_names_no_end_has_none(target: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    """The model config's is not asked for then, and neither is it for other settings."""
    model = Path(shutil.copytree(target, tmp_path / "model"))
    (model / "generation_config.json").write_text(json.dumps(settings))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"eos_token_id": OFTEN}))
    prompt = encode(target, PROMPT)
    expected = Plain.of(model).greedy(prompt, COUNT)
    assert OFTEN in expected[:-1]
    assert local(model, target, max_nodes=24).generate(prompt, COUNT)[0] == expected


def test_settings_that_only_sampling_heeds_are_left_alone(target: Path, tmp_path: Path) -> None:
    sampling = {"do_sample": True, "temperature": 0.6, "top_k": 1, "top_p": 0.5, "typical_p": 0.5}
    model = with_settings(target, tmp_path / "model", sampling)
    prompt = encode(target, PROMPT)
    engine = local(model, target, max_nodes=24)
    assert engine.job.notices == ()
    assert engine.generate(prompt, COUNT)[0] == Plain.of(target).greedy(prompt, COUNT)


def test_rules_that_are_not_followed_are_named_before_the_start(target: Path, tmp_path: Path) -> None:
    model = with_settings(target, tmp_path / "model", {"num_beams": 4, "stop_strings": ["x"], "penalty_alpha": None})
    (note,) = local(model, None).job.notices
    assert "num_beams, stop_strings, which llmcad does not follow" in note
    command = [sys.executable, "-m", "llmcad_actors.cli", "plan", "--target", str(model), "--draft", "none", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr == f"llmcad: {note}\n"
    assert json.loads(done.stdout)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"repetition_penalty": 2}, "repetition_penalty must be a number above 0 with a decimal point"),
        ({"repetition_penalty": -1.0}, "found -1.0"),
        ({"no_repeat_ngram_size": "2"}, "no_repeat_ngram_size must be a whole number"),
        ({"bad_words_ids": [5]}, "bad_words_ids must be a list of lists of token ids"),
        ({"bad_words_ids": [[]]}, "bad_words_ids"),
        ({"bad_words_ids": [[257]]}, r"bad_words_ids .* \(ids below 257\)"),
        ({"min_length": True}, "min_length"),
        ({"forced_bos_token_id": 257}, "forced_bos_token_id must be a token id"),
        ({"forced_eos_token_id": [3, -1]}, "forced_eos_token_id"),
        ({"suppress_tokens": 4}, "suppress_tokens must be a list of token ids"),
        ({"begin_suppress_tokens": ["a"]}, "begin_suppress_tokens"),
    ],
    ids=str,
)
def test_a_value_that_cannot_be_is_refused_before_anything_starts(
    target: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    model = with_settings(target, tmp_path / "model", settings)
    with pytest.raises(CheckpointError, match=message):
        prepare(EngineConfig(target=str(model), memory="8GB"))


def test_whole_rows_of_logits_are_counted_into_the_plan(target: Path, tmp_path: Path) -> None:
    model = with_settings(target, tmp_path / "model", {"suppress_tokens": [3]})
    most = WHOLE_LOGITS_BYTES // (4 * 257)
    config = EngineConfig(target=str(target), memory="8GB", max_nodes=2 * most)
    plain, ruled = (prepare(replace(config, target=str(path))) for path in (target, model))
    more = dict(ruled.memory.rows())["activations"] - dict(plain.memory.rows())["activations"]
    assert more == (2 * most + MAX_REQUESTS - most) * 257 * 4
    few = prepare(replace(config, target=str(target), max_nodes=100))
    assert whole_rows(few.config, few.target, few.layout) == 100 + MAX_REQUESTS
