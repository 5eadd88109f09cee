import zlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from llmcad_actors.core.acceptance import Accepted, walk
from llmcad_actors.core.tree import ROOT, TokenTree
from tests.core.drafting import trees


def target(seed: int, path: tuple[int, ...]) -> int:
    """A target model's greedy choice after a path."""
    return zlib.crc32(repr((seed, path)).encode()) % 5


def choices_of(tree: TokenTree, seed: int) -> list[int]:
    """What the target says at the root and at each node."""
    return [target(seed, tuple(tree.tokens[list(tree.path(node))].tolist())) for node in range(ROOT, len(tree))]


def greedy(seed: int, count: int, stops: frozenset[int]) -> list[int]:
    """The target by itself, one token after the other, up to a stop token."""
    tokens: list[int] = []
    while len(tokens) < count and not (tokens and tokens[-1] in stops):
        tokens.append(target(seed, tuple(tokens)))
    return tokens


@given(trees(), st.integers(0, 10_000), st.frozensets(st.integers(0, 4), max_size=2))
def test_speculation_never_changes_the_output(tree: TokenTree, seed: int, stops: frozenset[int]) -> None:
    accepted = walk(tree, choices_of(tree, seed), stops)
    emitted = accepted.emitted(tree)
    assert len(emitted) == len(accepted.path) + 1 >= 1
    assert list(emitted) == greedy(seed, len(emitted), stops)


@given(trees(), st.integers(0, 10_000), st.frozensets(st.integers(0, 4), max_size=2))
def test_as_much_is_accepted_as_the_tree_holds(tree: TokenTree, seed: int, stops: frozenset[int]) -> None:
    accepted = walk(tree, choices_of(tree, seed), stops)
    end = accepted.path[-1] if accepted.path else ROOT
    assert accepted.path == (() if end == ROOT else tree.path(end))
    assert accepted.stopped == (accepted.bonus in stops)
    assert accepted.stopped or tree.child(end, accepted.bonus) is None


def test_a_stop_token_in_the_tree_ends_the_walk_as_its_bonus() -> None:
    tree = TokenTree.build([1, 2, 3], [-1, 0, 1], [-0.1] * 3)
    assert walk(tree, np.array([1, 2, 3, 4]), frozenset({2})) == Accepted((0,), 2, True)
    assert walk(tree, np.array([1, 2, 3, 4]), frozenset()) == Accepted((0, 1, 2), 4, False)
    assert walk(tree, np.array([1, 2, 3, 4]), frozenset({4})) == Accepted((0, 1, 2), 4, True)


def test_an_empty_tree_yields_the_targets_own_next_token() -> None:
    assert walk(TokenTree.empty(), [7], frozenset()) == Accepted((), 7, False)


def test_what_is_accepted_consists_of_plain_integers() -> None:
    accepted = walk(TokenTree.build([1], [-1], [-0.1]), np.array([1, 2]), frozenset())
    assert type(accepted.path[0]) is int and type(accepted.bonus) is int and type(accepted.stopped) is bool
    assert type(accepted.emitted(TokenTree.build([1], [-1], [-0.1]))[0]) is int
