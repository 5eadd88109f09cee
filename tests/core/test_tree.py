import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmcad_actors.core.tree import ROOT, TokenTree, bounded_logprobs, most_probable
from tests.core.drafting import paths_in, trees


def lines(tree: TokenTree) -> list[tuple[int, ...]]:
    """Each node's path, itself included, worked out from the parents alone."""
    found: list[tuple[int, ...]] = []
    for node, parent in enumerate(tree.parents.tolist()):
        found.append(((*found[parent], node)) if parent != ROOT else (node,))
    return found


@given(trees())
def test_depth_and_cumulative_follow_the_path(tree: TokenTree) -> None:
    for node, line in enumerate(lines(tree)):
        assert tree.path(node) == line
        assert tree.depths[node] == len(line)
        assert tree.cumulative[node] == pytest.approx(float(tree.logprobs[list(line)].sum(dtype=np.float64)))


@given(trees())
def test_a_mask_row_sees_the_root_the_ancestors_and_itself_only(tree: TokenTree) -> None:
    mask = tree.ancestor_mask()
    assert mask.shape == (len(tree) + 1, len(tree) + 1) and mask.dtype == np.bool_
    assert np.flatnonzero(mask[0]).tolist() == [0]
    for node, line in enumerate(lines(tree)):
        assert np.flatnonzero(mask[node + 1]).tolist() == [0, *(i + 1 for i in line)]


@given(trees(), st.integers(0, 26))
def test_the_n_most_probable_prefixes_always_form_a_tree(tree: TokenTree, count: int) -> None:
    best, kept = tree.top(count)
    assert len(best) == len(kept) == min(count, len(tree))
    assert set(tree.parents[kept].tolist()) <= {ROOT, *kept.tolist()}
    assert paths_in(best) <= paths_in(tree)
    TokenTree.build(best.tokens, best.parents, best.logprobs)


@given(trees(), st.integers(0, 26))
def test_no_node_left_out_is_more_probable_than_one_taken(tree: TokenTree, count: int) -> None:
    best, kept = tree.top(count)
    left = np.setdiff1d(np.arange(len(tree)), kept)
    assert best.cumulative.min(initial=0.0) >= tree.cumulative[left].max(initial=-np.inf)
    np.testing.assert_array_equal(best.tokens, tree.tokens[kept])
    np.testing.assert_allclose(best.cumulative, tree.cumulative[kept])


def test_ties_go_to_the_earlier_node() -> None:
    tree = TokenTree.build([5, 6, 7], [-1, -1, 0], [-1.0, -1.0, 0.0])
    assert tree.top(2)[1].tolist() == [0, 1]
    pairs = np.tile([-1.0, -2.0], 100)
    assert most_probable(pairs, 150).tolist() == [*range(0, 200, 2), *range(1, 100, 2)]


@given(trees(), st.data())
def test_rerooting_keeps_the_subtree_strictly_below(tree: TokenTree, data: st.DataObject) -> None:
    node = data.draw(st.integers(ROOT, len(tree) - 1))
    subtree, kept = tree.reroot(node)
    start = () if node == ROOT else lines(tree)[node]
    assert kept.tolist() == [i for i, line in enumerate(lines(tree)) if line[: len(start)] == start and line != start]
    for new, old in enumerate(kept.tolist()):
        assert tuple(kept[list(subtree.path(new))].tolist()) == lines(tree)[old][len(start) :]
    np.testing.assert_array_equal(subtree.tokens, tree.tokens[kept])
    np.testing.assert_array_equal(subtree.logprobs, tree.logprobs[kept])
    rebuilt = TokenTree.build(subtree.tokens, subtree.parents, subtree.logprobs)
    np.testing.assert_array_equal(subtree.depths, rebuilt.depths)
    np.testing.assert_array_equal(subtree.cumulative, rebuilt.cumulative)


@given(trees())
def test_children_are_found_by_their_token(tree: TokenTree) -> None:
    for node in range(ROOT, len(tree)):
        children = tree.children(node)
        assert children == tuple(i for i in range(len(tree)) if tree.parents[i] == node)
        assert [tree.child(node, int(tree.tokens[i])) for i in children] == list(children)
        assert tree.child(node, 99) is None


@given(trees(), st.integers(0, 24))
def test_a_tree_extended_is_the_tree_built_at_once(tree: TokenTree, cut: int) -> None:
    first = TokenTree.build(tree.tokens[:cut], tree.parents[:cut], tree.logprobs[:cut])
    assert first.extended(tree.parents[cut:], tree.tokens[cut:], tree.logprobs[cut:]) == tree


def test_trees_differ_by_token_by_parent_and_by_logprob() -> None:
    tree = TokenTree.build([1, 2], [-1, 0], [-0.5, -0.5])
    assert tree == TokenTree.build([1, 2], [-1, 0], [-0.5, -0.5])
    assert hash(tree) == hash(TokenTree.build([1, 2], [-1, 0], [-0.5, -0.5]))
    assert tree != TokenTree.build([1, 3], [-1, 0], [-0.5, -0.5])
    assert tree != TokenTree.build([1, 2], [-1, -1], [-0.5, -0.5])
    assert tree != TokenTree.build([1, 2], [-1, 0], [-0.5, -0.6])
    assert tree != "tree"


@pytest.mark.parametrize(
    ("tokens", "parents", "logprobs", "complaint"),
    [
        ([1, 2], [-1], [-0.1, -0.1], "equally long"),
        ([1], [-1], [-0.1, -0.1], "equally long"),
        ([[1]], [[-1]], [[-0.1]], "equally long"),
        ([1], [0], [-0.1], "before their children"),
        ([1, 2], [1, -1], [-0.1, -0.1], "before their children"),
        ([1], [-2], [-0.1], "before their children"),
        ([1, 1], [-1, -1], [-0.1, -0.1], "same token"),
        ([1], [-1], [float("nan")], "not a number"),
    ],
)
def test_what_is_no_tree_is_refused(
    tokens: list[int], parents: list[int], logprobs: list[float], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        TokenTree.build(tokens, parents, logprobs)


def test_the_same_token_may_follow_different_parents() -> None:
    assert len(TokenTree.build([1, 1, 1], [-1, 0, 1], [-0.1, -0.1, -0.1])) == 3


def test_a_tree_cannot_be_changed() -> None:
    source = np.array([1, 2])
    tree = TokenTree.build(source, [-1, 0], [-0.1, -0.1])
    source[0] = 9
    assert tree.tokens.tolist() == [1, 2]
    with pytest.raises(ValueError, match="read-only"):
        tree.tokens[0] = 9
    with pytest.raises(dataclasses.FrozenInstanceError):
        tree.tokens = source  # type: ignore[misc]


def test_impossible_and_rounded_up_logprobs_stay_finite_and_at_most_zero() -> None:
    tree = TokenTree.build([1, 2], [-1, 0], [1e-7, -np.inf])
    assert tree.cumulative[0] == 0.0
    assert np.exp(tree.cumulative[1]) == 0.0 and np.isfinite(tree.cumulative[1])
    assert bounded_logprobs(np.array([-np.inf, 0.5])).max() == 0.0


def test_the_empty_tree_has_a_root_and_nothing_else() -> None:
    tree = TokenTree.empty()
    assert len(tree) == 0 and tree.ancestor_mask().tolist() == [[True]]
    assert tree.top(3)[1].tolist() == [] and tree.reroot(ROOT)[1].tolist() == []
    assert tree.children(ROOT) == () and tree.path(ROOT) == ()
    assert tree.tokens.dtype == np.int64 and tree.parents.dtype == np.int32
    assert tree.logprobs.dtype == np.float32 and tree.cumulative.dtype == np.float64
