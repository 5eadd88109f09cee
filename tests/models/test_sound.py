"""Nothing is chosen by logits that are not finite, nor by weights that changed under the pass; the legal goes on."""

import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmcad_actors.core.tree import TokenTree
from llmcad_actors.errors import CheckpointError, StorageError
from llmcad_actors.models.draft import DraftModel
from tests.fakes import chain, run_prefix
from tests.models.checkpoints import target_of
from tests.plain import Plain
from tests.tiny import BYTE_VOCAB, tiny_llama

PROMPT = (5, 70, 12, 200)
HEAD, EMBEDDING, NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"
NOT_FINITE = r"the target .* computes logits that are not finite \(NaN or infinite\) in float32"


def changed(path: Path, change: Callable[[dict[str, torch.Tensor]], object], **settings: object) -> Path:
    """A tiny model with other weights."""
    tiny_llama(path, seed=6, **settings)  # type: ignore[arg-type]
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("row", [3, BYTE_VOCAB - 1])
def test_a_head_with_numbers_that_are_none_ends_the_pass(tmp_path: Path, row: int, value: float) -> None:
    """In whichever part of a head that is read in parts; an infinity meets both signs, and is NaN or infinite."""
    path = changed(tmp_path, lambda weights: weights[HEAD][row].fill_(value))
    for max_shard_bytes in (None, 10_000):
        target, _ = target_of(path, max_shard_bytes=max_shard_bytes)
        target.begin(PROMPT, ())
        with pytest.raises(CheckpointError, match=NOT_FINITE):
            target.verify(TokenTree.empty())


def test_sums_that_outgrow_the_type_end_the_pass_and_float32_is_proposed(tmp_path: Path) -> None:
    path = changed(tmp_path, lambda weights: weights[NORM].fill_(3e38), dtype=torch.bfloat16)
    target, _ = target_of(path, dtype=torch.bfloat16)
    target.begin(PROMPT, ())
    with pytest.raises(CheckpointError, match=r"in bfloat16: .*; compute with --dtype float32, or check its files"):
        target.verify(TokenTree.empty())


def test_the_rules_of_a_generation_config_do_not_hide_them(tmp_path: Path) -> None:
    path = changed(tmp_path, lambda weights: weights[HEAD][3].fill_(math.nan))
    (path / "generation_config.json").write_text('{"eos_token_id": 0, "suppress_tokens": [3]}')
    target, _ = target_of(path)
    target.begin(PROMPT, ())
    with pytest.raises(CheckpointError, match=NOT_FINITE):
        target.verify(TokenTree.empty())


def test_a_generation_config_that_leaves_no_token_is_named(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path, seed=6)
    forbidden = ", ".join(str(token) for token in range(BYTE_VOCAB))
    (path / "generation_config.json").write_text(f'{{"suppress_tokens": [{forbidden}]}}')
    target, _ = target_of(path)
    target.begin(PROMPT, ())
    with pytest.raises(CheckpointError, match=r"no token is left to go on with .* generation_config\.json"):
        target.verify(TokenTree.empty())


def test_an_unsound_node_off_the_accepted_path_is_no_matter(tmp_path: Path) -> None:
    """Its logits alone overflow, as its embedding is large; no other row sees it."""
    strange = 9

    def change(weights: dict[str, torch.Tensor]) -> None:
        weights[HEAD][3] = 0
        weights[HEAD][3, 0] = 5.5e37  # times 6.9, at most, behind the last norm
        weights[EMBEDDING][:, 0] = 0  # the rows that others see have little there
        weights[EMBEDDING][strange, 0] = 1e6

    path = changed(tmp_path, change, layers=1)
    expected = Plain.of(path).continuation(PROMPT, 1)[0]
    target, _ = target_of(path)
    target.begin(PROMPT, ())
    verdict = target.verify(chain([strange, 7]))
    assert (verdict.path, verdict.bonus) == ((), expected)


def test_a_draft_that_computes_no_numbers_is_named_with_the_way_out(tmp_path: Path) -> None:
    path = changed(tmp_path, lambda weights: weights[HEAD][3].fill_(math.nan))
    draft = DraftModel(path, dtype=torch.float32, vocab=BYTE_VOCAB, rows=64, slots=16, children=4)
    with pytest.raises(CheckpointError, match=rf"the draft {path} computes .* not finite .* use --draft none"):
        run_prefix(draft, PROMPT)


def test_a_file_that_changes_under_a_pass_is_what_the_pass_ends_with(tmp_path: Path) -> None:
    """Whatever else came of it: what was read meanwhile explains it."""
    path = changed(tmp_path, lambda weights: weights[HEAD][3].fill_(math.nan))
    file = path / "model.safetensors"
    target, _ = target_of(path)
    target.begin(PROMPT, ())
    os.utime(file, ns=(0, 0))
    with pytest.raises(StorageError, match=rf"{file} changed while it was in use"):
        target.verify(TokenTree.empty())
    sound = tiny_llama(tmp_path / "sound", seed=6)
    target, _ = target_of(sound)
    target.begin(PROMPT, ())
    before = target.verify(TokenTree.empty())
    os.utime(sound / "model.safetensors", ns=(0, 0))
    for _ in range(2):
        with pytest.raises(StorageError, match="changed while it was in use"):
            target.verify(chain([before.bonus]))
