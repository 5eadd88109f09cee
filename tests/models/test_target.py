"""The streamed target decides as the plain model does, whatever it is given, and keeps nothing that it was lent."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from llmcad_actors.core.tree import TokenTree
from llmcad_actors.errors import CheckpointError, DeadlineError
from llmcad_actors.models.kv_arena import common_prefix
from llmcad_actors.models.target import Target
from llmcad_actors.storage.checkpoint import Checkpoint
from llmcad_actors.storage.layout import layout_of
from tests.fakes import MemoryShards, OneText, chain, random_trees, tokens_to
from tests.models.checkpoints import CAPACITY, target_of
from tests.plain import Plain
from tests.tiny import BYTE_VOCAB, tiny_llama

PROMPT = (5, 70, 12, 200, 33, 33, 9)
ids = st.integers(1, BYTE_VOCAB - 1)


@st.composite
def guesses(draw: st.DrawFn, plain: Plain, committed: Sequence[int], max_nodes: int = 20) -> TokenTree:
    """Any tree below `committed`. About half of its nodes are what the target will say there, the others are not."""
    tree = TokenTree.empty()
    for _ in range(draw(st.integers(0, max_nodes))):
        parent = draw(st.integers(-1, len(tree) - 1))
        right = plain.next((*committed, *tokens_to(tree, parent)))
        token = right if draw(st.booleans()) else draw(ids)
        if tree.child(parent, token) is None:
            tree = tree.extended([parent], [token], [-0.5])
    return tree


def decode(target: OneText, prompt: Sequence[int], trees: Sequence[TokenTree]) -> list[int]:
    """What `trees`, one pass each, make the target emit."""
    target.begin(prompt, ())
    emitted: list[int] = []
    for tree in trees:
        verdict = target.verify(tree)
        emitted += [*tree.tokens[list(verdict.path)].tolist(), verdict.bonus]
    return emitted


@settings(max_examples=15)
@given(data=st.data())
def test_whatever_the_tree_the_verdict_is_the_plain_models(plain: Plain, data: st.DataObject) -> None:
    target = _target(plain.path)
    prompt = tuple(data.draw(st.lists(ids, min_size=1, max_size=24), "prompt"))
    target.begin(prompt, ())
    committed = prompt
    for _ in range(3):
        tree = data.draw(guesses(plain, committed), "tree")
        expected, verdict = plain.judge(tree, committed), target.verify(tree)
        assert (verdict.path, verdict.bonus, verdict.stopped) == (expected.path, expected.bonus, False)
        committed = (*committed, *expected.emitted(tree))


@cache
def _target(path: Path) -> OneText:
    """Building one takes longer than a pass; each example begins anew."""
    return target_of(path)[0]


def test_over_many_passes_the_output_is_greedy_generation(plain: Plain) -> None:
    target, _ = target_of(plain.path)
    expected = plain.continuation(PROMPT, 64)
    true_chain_with_siblings = [side_by_side(expected[i + 1 : i + 5]) for i in range(0, 60, 6)]
    for trees in ([TokenTree.empty()] * 20, true_chain_with_siblings, nonsense(seed=1), nonsense(seed=2)):
        emitted = decode(target, PROMPT, trees)
        assert tuple(emitted[:64]) == expected[: len(emitted)]


def nonsense(seed: int) -> list[TokenTree]:
    return [random_trees(seed, BYTE_VOCAB)(tuple(range(i))) for i in range(20)]


def side_by_side(tokens: Sequence[int]) -> TokenTree:
    """A chain, each of whose nodes has a wrong sibling before and after it."""
    tree, parent = TokenTree.empty(), -1
    for token in tokens:
        wrong = [(token + 1) % BYTE_VOCAB, (token + 2) % BYTE_VOCAB]
        tree = tree.extended([parent] * 3, [wrong[0], token, wrong[1]], [-1.0, -2.0, -3.0])
        parent = len(tree) - 2
    return tree


@pytest.mark.parametrize("length", [1, 7, 40, 128])
def test_a_tree_made_from_the_true_continuation_is_accepted_whole(plain: Plain, length: int) -> None:
    target, _ = target_of(plain.path)
    expected = plain.continuation(PROMPT, length + 1)
    target.begin(PROMPT, ())
    verdict = target.verify(chain(expected[:length]))
    assert verdict.path == tuple(range(length))
    assert verdict.bonus == expected[length]
    assert target.stats.rows == len(PROMPT) + length


def test_a_stop_token_ends_the_path_before_it(tiny: Path) -> None:
    target, _ = target_of(tiny)
    expected = Plain.of(tiny).continuation(PROMPT, 6)
    target.begin(PROMPT, expected[3:4])
    verdict = target.verify(chain(expected))
    stop = expected.index(expected[3])
    assert (verdict.path, verdict.bonus, verdict.stopped) == (tuple(range(stop)), expected[3], True)


@settings(max_examples=25)
@given(data=st.data())
def test_a_shared_prefix_is_kept_and_changes_nothing(tiny: Path, data: st.DataObject) -> None:
    plain, target = Plain.of(tiny), _target(tiny)
    target.begin((BYTE_VOCAB - 1,), ())
    stem = tuple(data.draw(st.lists(ids, min_size=1, max_size=10), "stem"))
    before: tuple[int, ...] = ()
    for _ in range(3):
        prompt = stem[: data.draw(st.integers(0, len(stem)))] + tuple(data.draw(st.lists(ids, min_size=1, max_size=6)))
        assert target.begin(prompt, ()) == common_prefix(before, prompt[:-1])
        committed = prompt
        for seed in range(2):
            tree = random_trees(seed, BYTE_VOCAB)(prompt)
            expected, verdict = plain.judge(tree, committed), target.verify(tree)
            assert (verdict.path, verdict.bonus) == (expected.path, expected.bonus)
            committed = (*committed, *expected.emitted(tree))
        before = committed[:-1]  # the last token has not been run


def test_a_prompt_that_goes_on_from_the_last_output_runs_only_what_is_new(tiny: Path) -> None:
    target, _ = target_of(tiny)
    emitted = decode(target, PROMPT, [TokenTree.empty()] * 4)
    assert target.begin((*PROMPT, *emitted, 7, 8), ()) == len(PROMPT) + 3
    assert target.verify(TokenTree.empty()).bonus == Plain.of(tiny).next((*PROMPT, *emitted, 7, 8))


def test_a_head_cut_into_slices_makes_the_same_choices(plain: Plain) -> None:
    whole, _ = target_of(plain.path)
    expected = decode(whole, PROMPT, nonsense(seed=3))
    for max_shard_bytes in (20_000, 5_000):
        cut, shards = target_of(plain.path, max_shard_bytes=max_shard_bytes)
        assert decode(cut, PROMPT, nonsense(seed=3)) == expected
        assert len({name for name in shards.asked if name.startswith("head.")}) > 1


@pytest.mark.parametrize("max_shard_bytes", [None, 20_000, 5_000])
def test_ties_go_to_the_lowest_id(tiny: Path, tmp_path: Path, max_shard_bytes: int | None) -> None:
    path = rewritten(tiny, tmp_path, lambda head: head.zero_())
    target, _ = target_of(path, max_shard_bytes=max_shard_bytes)
    assert decode(target, PROMPT, [TokenTree.empty(), chain((0, 0, 0))]) == [0, 0, 0, 0, 0]


def rewritten(path: Path, copy: Path, change_head: object) -> Path:
    """`path` with another head."""
    for file in path.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    weights = load_file(path / "model.safetensors")
    assert callable(change_head)
    change_head(weights["lm_head.weight"])
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def test_a_pass_asks_for_every_shard_once_in_order(tiny: Path) -> None:
    target, shards = target_of(tiny, max_shard_bytes=20_000)
    decode(target, PROMPT, [TokenTree.empty(), chain((1, 2))])
    assert shards.asked == [spec.name for spec in target.layout.shards] * 2


def test_nothing_that_was_lent_is_kept_after_a_pass(tiny: Path) -> None:
    target, shards = target_of(tiny)
    decode(target, PROMPT, [chain((1, 2)), TokenTree.empty()])
    assert shards.num_open == 0
    assert shards.num_alive() == 0


@pytest.mark.parametrize("shard", ["layer.0", "layer.2", "head.0"])
@pytest.mark.parametrize("kind", ["late", "broken"])
def test_a_pass_that_fails_gives_everything_back_and_leaves_no_trace(tiny: Path, shard: str, kind: str) -> None:
    target, shards = target_of(tiny)
    plain = Plain.of(tiny)
    expected = plain.continuation(PROMPT, 9)
    target.begin(PROMPT, ())
    target.verify(chain(expected[:2]))
    getattr(shards, kind).add(shard)
    with pytest.raises((DeadlineError, KeyError)):
        target.verify(chain(expected[3:6]))
    assert shards.num_open == 0
    assert shards.num_alive() == 0
    getattr(shards, kind).clear()
    verdict = target.verify(chain(expected[3:6]))
    assert (verdict.path, verdict.bonus) == ((0, 1, 2), expected[6])
    assert decode(target, PROMPT, [TokenTree.empty()] * 3) == list(expected[:3])


def test_a_failed_first_pass_is_not_taken_for_a_cached_prompt(tiny: Path) -> None:
    target, shards = target_of(tiny)
    target.begin(PROMPT, ())
    shards.late.add("layer.1")
    with pytest.raises(DeadlineError):
        target.verify(TokenTree.empty())
    shards.late.clear()
    assert target.begin(PROMPT, ()) == 0
    assert target.verify(TokenTree.empty()).bonus == Plain.of(tiny).next(PROMPT)


def test_padding_takes_no_room_that_a_pass_needs(tiny: Path) -> None:
    target, _ = target_of(tiny)
    prompt = tuple(1 + i % 200 for i in range(CAPACITY - 3))
    target.begin(prompt, ())
    assert target.verify(chain((1, 2, 3))).bonus == Plain.of(tiny).next(prompt)


def test_more_rows_than_planned_for_are_refused(tiny: Path) -> None:
    target, _ = target_of(tiny)
    with pytest.raises(ValueError, match=f"the cache holds {CAPACITY} rows"):
        target.begin([1] * (CAPACITY + 1), ())
    target.begin((1, 2), ())
    with pytest.raises(ValueError, match="room for trees of 128 nodes, not of 129"):
        target.verify(chain([1] * 129))


def test_weights_that_are_not_the_architectures_are_refused(tiny: Path, tmp_path: Path) -> None:
    for file in tiny.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"mlp_bias": false', '"mlp_bias": true'))
    checkpoint = Checkpoint.open(tiny)
    layout = layout_of(checkpoint)
    moved = Checkpoint(tmp_path, checkpoint.config, {}, checkpoint.tensors)
    with pytest.raises(CheckpointError, match=r"layer 0: mlp.*missing in the checkpoint"):
        Target(moved, layout, MemoryShards(layout), dtype=torch.float32, capacity=CAPACITY)


def test_half_precision_weights_compute_in_float32_when_asked_to(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path, seed=5, dtype=torch.bfloat16)
    target, _ = target_of(path)
    plain = Plain.of(path)
    assert decode(target, PROMPT, [TokenTree.empty()] * 8) == list(plain.continuation(PROMPT, 8))


def test_choices_are_plain_integers(tiny: Path) -> None:
    target, _ = target_of(tiny)
    target.begin(PROMPT, ())
    verdict = target.verify(chain(np.array([1, 2, 3]).tolist()))
    assert type(verdict.bonus) is int
