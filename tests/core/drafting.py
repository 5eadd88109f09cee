"""A pretend draft model: the candidates of a path depend on its tokens and a seed alone."""

import numpy as np
from hypothesis import strategies as st

from llmcad_actors.core.growth import TreeBuilder
from llmcad_actors.core.tree import ROOT, TokenTree

VOCAB = 12


def candidates(seed: int, path: tuple[int, ...], count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` likeliest tokens after `path` and their log-probabilities, descending."""
    rng = np.random.default_rng([seed, len(path), *path])
    probabilities = rng.dirichlet(np.full(VOCAB, 0.3)) * 0.99 + 0.01 / VOCAB
    best = np.argsort(-probabilities)[:count]
    return best, np.log(probabilities[best])


def path_of(builder: TreeBuilder, node: int) -> tuple[int, ...]:
    """The tokens from the root to a builder's node."""
    path: list[int] = []
    while node != ROOT:
        tokens, parents, _ = builder.rows(np.array([node]))
        path.insert(0, int(tokens[0]))
        node = int(parents[0])
    return tuple(path)


def all_paths(builder: TreeBuilder) -> list[tuple[int, ...]]:
    """`path_of` every scored node."""
    tokens, parents, _ = builder.rows(np.arange(len(builder)))
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(tokens.tolist(), parents.tolist(), strict=True):
        paths.append((*paths[parent], token) if parent != ROOT else (token,))
    return paths


def step(
    builder: TreeBuilder, seed: int, *, limit: int = 64, beyond: bool = False, prefix: tuple[int, ...] = ()
) -> int:
    """One draft step; returns the number of nodes run."""
    nodes = builder.next_nodes(limit, beyond)
    if nodes:
        answers = [candidates(seed, prefix + path_of(builder, node), VOCAB) for node in nodes]
        builder.expand(nodes, np.stack([tokens for tokens, _ in answers]), np.stack([logs for _, logs in answers]))
    return len(nodes)


def grow(builder: TreeBuilder, seed: int, max_steps: int = 200) -> int:
    """Steps until the builder is exhausted; returns how many."""
    steps = 0
    while steps < max_steps and step(builder, seed):
        steps += 1
    return steps


def paths_in(tree: TokenTree) -> set[tuple[int, ...]]:
    """Every node of a tree as the tokens that lead to it."""
    return {tuple(tree.tokens[list(tree.path(node))].tolist()) for node in range(len(tree))}


@st.composite
def trees(draw: st.DrawFn, max_nodes: int = 24, max_token: int = 4) -> TokenTree:
    """Any tree; log-probabilities with many ties and zeros."""
    nodes: dict[tuple[int, int], float] = {}
    for _ in range(draw(st.integers(0, max_nodes))):
        place = (draw(st.integers(ROOT, len(nodes) - 1)), draw(st.integers(0, max_token)))
        nodes.setdefault(place, draw(st.sampled_from([0.0, -0.5, -1.0]) | st.floats(-30, 0)))
    return TokenTree.build([token for _, token in nodes], [parent for parent, _ in nodes], list(nodes.values()))
