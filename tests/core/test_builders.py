"""What holds for every tree builder."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmcad_actors.core.best_first import BestFirst
from llmcad_actors.core.builders import make_builder
from llmcad_actors.core.fixed_expansion import FixedExpansion
from llmcad_actors.core.growth import TreeBuilder
from llmcad_actors.core.pacer import BranchPacer
from llmcad_actors.core.tree import ROOT, TokenTree
from tests.core.drafting import VOCAB, all_paths, candidates, grow, path_of, paths_in, step

BUILDERS: dict[str, Callable[[], TreeBuilder]] = {
    "best-first": lambda: BestFirst(20, batch=4, children=6),
    "pacer": lambda: BranchPacer(20, threshold=0.2, batch=2),
    "fixed": lambda: FixedExpansion((2, 1, 3, 1), batch=4),
}
KINDS = pytest.mark.parametrize("kind", BUILDERS)
seeds = st.integers(0, 10_000)


@KINDS
def test_a_new_builder_asks_for_the_root_first_and_alone(kind: str) -> None:
    builder = BUILDERS[kind]()
    growth = builder.growth()
    assert builder.next_nodes(8) == [ROOT] and builder.next_nodes(8, beyond=True) == [ROOT]
    assert not builder.is_expanded(ROOT) and len(builder) == 0
    assert (growth.num_nodes, growth.steps, growth.depth, growth.exhausted) == (0, 0, 0, False)
    assert growth.best_frontier == growth.last_confidence == 1.0 and 0 < growth.next_gain < 1
    tree, ids = builder.submission()
    assert len(tree) == len(ids) == 0


@KINDS
@given(seed=seeds, steps=st.integers(0, 12))
def test_the_submission_is_a_tree_of_the_drafts_own_candidates(kind: str, seed: int, steps: int) -> None:
    builder = BUILDERS[kind]()
    for _ in range(steps):
        step(builder, seed)
    tree, ids = builder.submission()
    TokenTree.build(tree.tokens, tree.parents, tree.logprobs)
    for node, builder_node in enumerate(ids.tolist()):
        path = tuple(tree.tokens[list(tree.path(node))].tolist())
        assert path == path_of(builder, builder_node)
        tokens, logprobs = candidates(seed, path[:-1], VOCAB)
        assert tree.logprobs[node] == pytest.approx(logprobs[tokens.tolist().index(path[-1])], rel=1e-5)
    rebuilt = TokenTree.build(tree.tokens, tree.parents, tree.logprobs)
    np.testing.assert_allclose(tree.cumulative, rebuilt.cumulative)
    np.testing.assert_array_equal(tree.depths, rebuilt.depths)


@KINDS
@given(seed=seeds, limit=st.integers(0, 25))
def test_a_smaller_submission_is_made_of_its_most_probable_nodes(kind: str, seed: int, limit: int) -> None:
    builder = BUILDERS[kind]()
    grow(builder, seed, max_steps=6)
    whole, whole_ids = builder.submission()
    some, ids = builder.submission(limit)
    expected, kept = whole.top(limit)
    assert some == expected and ids.tolist() == whole_ids[kept].tolist()


@KINDS
@given(seed=seeds, steps=st.integers(1, 12))
def test_growth_reports_the_tree_that_would_be_submitted(kind: str, seed: int, steps: int) -> None:
    builder = BUILDERS[kind]()
    run = sum(step(builder, seed) > 0 for _ in range(steps))
    growth, (tree, _) = builder.growth(), builder.submission()
    assert growth.steps == run
    assert growth.num_nodes == len(tree) and growth.depth == tree.depths.max()
    np.testing.assert_allclose(growth.cumulative, np.sort(np.exp(tree.cumulative))[::-1])
    assert growth.exhausted == (builder.next_nodes(64) == [])


@KINDS
@given(seed=seeds, steps=st.integers(1, 6))
def test_the_best_frontier_is_the_likeliest_node_not_yet_run(kind: str, seed: int, steps: int) -> None:
    builder = BUILDERS[kind]()
    for _ in range(steps):
        step(builder, seed)
    waiting = [node for node in range(len(builder)) if not builder.is_expanded(node)]
    assert builder.growth().best_frontier == pytest.approx(max(probability(seed, path_of(builder, n)) for n in waiting))


def probability(seed: int, path: tuple[int, ...]) -> float:
    product = 1.0
    for end, token in enumerate(path):
        tokens, logprobs = candidates(seed, path[:end], VOCAB)
        product *= float(np.exp(logprobs[tokens.tolist().index(token)]))
    return product


@KINDS
@given(seed=seeds, steps=st.integers(1, 6))
def test_the_last_confidence_is_the_top_probability_of_the_newest_steps_best_node(
    kind: str, seed: int, steps: int
) -> None:
    builder = BUILDERS[kind]()
    for _ in range(steps):
        best = builder.next_nodes(64)
        if not best:
            break
        path = path_of(builder, best[0])
        step(builder, seed)
        expected = float(np.exp(candidates(seed, path, 1)[1][0]))
        assert builder.growth().last_confidence == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["best-first", "fixed"])  # the pacer stops at a number of nodes, not at the best
@given(seed=seeds)
def test_an_exhausted_builder_submits_the_same_tree_whatever_is_grown_beyond(kind: str, seed: int) -> None:
    builder = BUILDERS[kind]()
    grow(builder, seed)
    before, ids = builder.submission()
    assert builder.growth().exhausted and builder.growth().next_gain == 0.0
    assert sum(step(builder, seed, beyond=True) > 0 for _ in range(5)) == 5
    after, new_ids = builder.submission()
    assert after == before
    np.testing.assert_array_equal(ids, new_ids)


@KINDS
@given(seed=seeds, steps=st.integers(1, 10), data=st.data())
def test_rerooting_keeps_what_was_grown_below_and_only_that(
    kind: str, seed: int, steps: int, data: st.DataObject
) -> None:
    builder = BUILDERS[kind]()
    for _ in range(steps):
        step(builder, seed, beyond=True)
    node = data.draw(st.integers(ROOT, len(builder) - 1))
    start, was_expanded = path_of(builder, node), builder.is_expanded(node)
    before = {i: (path, builder.is_expanded(i)) for i, path in enumerate(all_paths(builder))}
    below = [i for i, (path, _) in before.items() if path[: len(start)] == start and path != start]

    kept = builder.reroot(node)

    assert kept.tolist() == below and len(builder) == len(below)
    assert all_paths(builder) == [before[old][0][len(start) :] for old in below]
    assert builder.rows(np.arange(len(below)))[2].tolist() == list(map(len, all_paths(builder)))
    assert [builder.is_expanded(new) for new in range(len(below))] == [before[old][1] for old in below]
    assert builder.is_expanded(ROOT) == was_expanded and builder.growth().steps == 0
    assert (builder.next_nodes(1) == [ROOT]) == (not was_expanded)


@KINDS
@given(seed=seeds, data=st.data())
def test_a_head_start_grows_on_as_if_it_had_been_grown_from_its_root(kind: str, seed: int, data: st.DataObject) -> None:
    builder, reference = BUILDERS[kind](), BUILDERS[kind]()
    for _ in range(6):
        step(builder, seed, beyond=True)
    node = data.draw(st.sampled_from([i for i in range(len(builder)) if builder.is_expanded(i)]))
    prefix = path_of(builder, node)
    builder.reroot(node)
    while step(builder, seed, prefix=prefix):
        pass
    tree, _ = builder.submission()
    TokenTree.build(tree.tokens, tree.parents, tree.logprobs)
    np.testing.assert_allclose(tree.cumulative, [np.log(probability_after(seed, prefix, p)) for p in in_order(tree)])
    if kind == "best-first":
        while step(reference, seed, prefix=prefix):
            pass
        assert paths_in(tree) == paths_in(reference.submission()[0])


def in_order(tree: TokenTree) -> list[tuple[int, ...]]:
    return [tuple(tree.tokens[list(tree.path(node))].tolist()) for node in range(len(tree))]


def probability_after(seed: int, prefix: tuple[int, ...], path: tuple[int, ...]) -> float:
    return probability(seed, prefix + path) / probability(seed, prefix)


@KINDS
def test_scored_children_are_found_by_token(kind: str) -> None:
    builder = BUILDERS[kind]()
    for _ in range(3):
        step(builder, 7)
    for node in range(len(builder)):
        tokens, parents, _ = builder.rows(np.array([node]))
        assert builder.find(int(parents[0]), int(tokens[0])) == node
    assert builder.find(ROOT, VOCAB + 1) is None


@KINDS
def test_a_reset_builder_grows_the_same_tree_again(kind: str) -> None:
    builder = BUILDERS[kind]()
    grow(builder, 3)
    tree, _ = builder.submission()
    builder.reset()
    assert len(builder) == 0 and not builder.is_expanded(ROOT) and builder.growth().steps == 0
    grow(builder, 3)
    assert builder.submission()[0] == tree


@KINDS
def test_a_limit_of_nodes_is_kept(kind: str) -> None:
    builder = BUILDERS[kind]()
    assert builder.next_nodes(0) == []
    for limit in itertools.islice(itertools.cycle([1, 2, 3]), 6):
        assert len(builder.next_nodes(limit)) <= limit
        assert len(builder.next_nodes(64)) <= 4
        step(builder, 1, beyond=True)


@KINDS
def test_running_a_node_twice_is_a_mistake(kind: str) -> None:
    builder = BUILDERS[kind]()
    tokens, logprobs = candidates(0, (), VOCAB)
    builder.expand([ROOT], tokens[None], logprobs[None])
    with pytest.raises(AssertionError, match="run already"):
        builder.expand([ROOT], tokens[None], logprobs[None])


@KINDS
def test_growth_beyond_ends_when_the_builder_is_full(kind: str) -> None:
    builder = BUILDERS[kind]()
    builder.max_scored = 60  # type: ignore[attr-defined]
    while step(builder, 1, beyond=True):
        assert len(builder) < 60 + 4 * VOCAB
    assert len(builder) >= 60


def test_builders_are_made_by_name() -> None:
    best = make_builder("best-first", 33, 5, 7, (1,))
    assert isinstance(best, BestFirst) and (best.max_nodes, best.batch, best.children) == (33, 5, 7)
    pacer = make_builder("pacer", 33, 5, 7, (1,))
    assert isinstance(pacer, BranchPacer) and (pacer.max_nodes, pacer.batch) == (33, 5)
    fixed = make_builder("fixed", 33, 5, 7, (1, 2))
    assert isinstance(fixed, FixedExpansion) and (fixed.widths, fixed.batch) == ((1, 2), 5)
    with pytest.raises(ValueError, match="'best'"):
        make_builder("best", 33, 5, 7, (1,))
