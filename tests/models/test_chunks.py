"""Long prompts run in chunks inside each layer, in one pass of the weights, and the output stays the plain model's."""

from pathlib import Path

import numpy as np
import pytest
import torch

from llmcad_actors.core.budget import PREFIX_ROWS
from llmcad_actors.core.request import Request
from llmcad_actors.core.round import Check
from llmcad_actors.core.tree import TokenTree
from llmcad_actors.models.chunks import ChunkedMask
from llmcad_actors.models.draft import DraftModel
from llmcad_actors.models.masks import SLIDING, SlidingWindows
from tests.fakes import chain, random_trees, run_prefix
from tests.family_cases import CASES, Case
from tests.models.checkpoints import target_of
from tests.plain import Plain
from tests.tiny import BYTE_VOCAB

PROMPT = tuple(np.random.default_rng(7).integers(1, BYTE_VOCAB, 600).tolist())
LONG = {"max_position_embeddings": 1024}
FAMILIES = ("llama", "mistral", "gemma2", "gpt2")
ONE_EACH = list({case.model_type: name for name, case in CASES.items()}.values())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_of_many_chunks_gives_greedy_generation(name: str, tmp_path: Path) -> None:
    path = Case(CASES[name].model_type, CASES[name].fields | LONG).save(tmp_path)
    expected = Plain(path).greedy(PROMPT, 24)
    target, shards = target_of(path, capacity=1024, prefill_chunk=64)
    target.begin(PROMPT, ())
    emitted = [target.verify(chain(expected[:8])).bonus]
    assert shards.asked == [spec.name for spec in target.layout.shards]  # once each, whatever the length
    while len(emitted) < 16:
        emitted.append(target.verify(TokenTree.empty()).bonus)
    assert tuple(emitted) == expected[8:]


@pytest.mark.parametrize("name", ONE_EACH)
def test_in_every_family_chunks_change_nothing(name: str, tmp_path: Path) -> None:
    path = CASES[name].save(tmp_path)
    whole, _ = target_of(path)
    parts, _ = target_of(path, prefill_chunk=7)
    for target in (whole, parts):
        target.begin(PROMPT[:60], ())
    for seed in range(4):
        tree = random_trees(seed, BYTE_VOCAB, max_nodes=30)(PROMPT[:seed])
        one, other = (target.verify(tree) for target in (whole, parts))
        assert (one.path, one.bonus) == (other.path, other.bonus)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("chunk", [1, 4, 16, 50])
def test_the_chunks_of_a_mask_are_rows_of_the_whole(tmp_path: Path, window: int | None, chunk: int) -> None:
    one, _ = target_of(CASES["llama"].save(tmp_path))
    one.begin(PROMPT[:9], count=20)
    one.verify(TokenTree.empty())
    one.text.tokens[9:] = PROMPT[9:15]  # some tokens that have not been run
    tree = random_trees(3, BYTE_VOCAB, max_nodes=30)(PROMPT[:5])
    (part,) = parts = one.target._parts([Check(1, tree)])
    positions, end = part.positions, 29 + len(tree)
    assert positions.tolist() == [*range(9, 15), *(14 + tree.depths)]
    one.target._arena.positions[part.places] = positions
    rows, keys = len(positions), one.target._arena.positions[:end]
    build = one.target._mask(parts, end)
    hidden = torch.finfo(torch.float32).min
    whole = build(0, rows)[0, 0]
    if window is not None:
        whole = whole.masked_fill(torch.from_numpy(keys[None] <= positions[:, None] - window), hidden)
    masks = SlidingWindows(window, by_layer_type=True).chunked(build, positions, keys)
    assert isinstance(masks, dict)
    mask = masks[SLIDING]
    assert isinstance(mask, ChunkedMask)
    assert mask.shape == (1, 1, rows, end)
    for start in range(0, rows, chunk):
        stop = min(start + chunk, rows)
        assert torch.equal(mask.rows_of(start, stop)[0, 0], whole[start:stop])
    assert bool((whole[np.arange(rows), part.places] == 0).all())


def test_what_a_pending_row_and_a_node_see(tmp_path: Path) -> None:
    """Two texts, of two tokens with room for one more, and of one with room for one more; their trees behind both."""
    one, _ = target_of(CASES["llama"].save(tmp_path))
    tree = TokenTree.build([1, 2, 3], [-1, -1, 1], [-1.0] * 3)
    for number, prompt in ((1, (7, 8)), (2, (9,))):
        one.target.begin(number, Request(prompt, 1, ()))
    parts = one.target._parts([Check(1, tree), Check(2, chain([5]))])
    seen = one.target._mask(parts, 9)(0, 7)[0, 0] == 0
    assert seen.int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 1, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 1, 0, 0],
        [1, 1, 0, 0, 0, 0, 1, 1, 0],
        [0, 0, 0, 1, 0, 0, 0, 0, 0],
        [0, 0, 0, 1, 0, 0, 0, 0, 1],
    ]


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_draft_runs_a_long_prompt_in_parts(name: str, tmp_path: Path) -> None:
    path = Case(CASES[name].model_type, CASES[name].fields | LONG).save(tmp_path)
    plain, length = Plain(path), 2 * PREFIX_ROWS + 30
    draft = DraftModel(path, dtype=torch.float32, vocab=BYTE_VOCAB, rows=1024, slots=8, children=4)
    tokens, logprobs = run_prefix(draft, PROMPT[:length])
    expected = plain.logprobs(PROMPT[:length])
    assert tokens[0].tolist() == np.argsort(-expected)[:4].tolist()
    assert logprobs[0] == pytest.approx(np.sort(expected)[::-1][:4], abs=1e-4)
    assert draft.arena.end >= length


@pytest.mark.parametrize("widest", [True, False])
def test_activations_of_a_layer_do_not_grow_with_the_prompt(widest: bool, tmp_path: Path) -> None:
    """Rows that a layer's products are given at once."""
    target, _ = target_of(CASES["llama"].save(tmp_path), prefill_chunk=32)
    seen: list[int] = []
    layer = target.target._model.get_submodule("model.layers.1.mlp" if widest else "model.layers.1.input_layernorm")
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    target.begin(PROMPT[:200], ())
    target.verify(TokenTree.empty())
    assert max(seen) == 32
    assert sum(seen) >= 200
