"""The token tree: what the draft proposes and one target pass verifies (paper, sections 1 and 2).

The root is the last committed token. It is not a node: node -1 stands for it wherever a parent or a place in
the tree is asked for, and it is row 0 of the ancestor mask. Nodes keep their insertion order, parents first.
A tree knows tokens and the draft's log-probabilities, and nothing of models, caches or how it was grown.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

ROOT = -1
_LOWEST_LOGPROB = -1e4  # stands for probability 0; finite, so that differences of sums stay defined


@dataclass(frozen=True, slots=True, eq=False)
class TokenTree:
    """An immutable tree of draft tokens. Make one with `build`, which checks, or `empty`."""

    tokens: np.ndarray  # int64[n]
    parents: np.ndarray  # int32[n], -1: child of the root; always smaller than the node's own index
    logprobs: np.ndarray  # float32[n], draft log p(token | path), at most 0
    depths: np.ndarray  # int32[n], 1: child of the root
    cumulative: np.ndarray  # float64[n], sum of logprobs from the root; a child never exceeds its parent

    def __post_init__(self) -> None:
        for array in (self.tokens, self.parents, self.logprobs, self.depths, self.cumulative):
            array.flags.writeable = False

    @classmethod
    def empty(cls) -> Self:
        return cls.build((), (), ())

    @classmethod
    def build(cls, tokens: npt.ArrayLike, parents: npt.ArrayLike, logprobs: npt.ArrayLike) -> Self:
        """Raises ValueError unless the three arrays describe a tree."""
        token_ids = np.array(tokens, np.int64)
        above = np.array(parents, np.int32)
        _check_shapes(token_ids, above, np.shape(logprobs))
        _check_tree(token_ids, above)
        bounded = bounded_logprobs(np.asarray(logprobs, np.float32))
        return cls(token_ids, above, bounded, *_sums_along_paths(above, bounded))

    def __len__(self) -> int:
        return len(self.tokens)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TokenTree):
            return NotImplemented
        mine, theirs = (
            (self.tokens, self.parents, self.logprobs),
            (other.tokens, other.parents, other.logprobs),
        )
        return all(np.array_equal(a, b) for a, b in zip(mine, theirs, strict=True))

    def __hash__(self) -> int:
        return hash((self.tokens.tobytes(), self.parents.tobytes()))

    def extended(self, parents: npt.ArrayLike, tokens: npt.ArrayLike, logprobs: npt.ArrayLike) -> Self:
        """This tree with more nodes after the present ones. New nodes may be children of new nodes."""
        return self.build(
            np.append(self.tokens, np.asarray(tokens, np.int64)),
            np.append(self.parents, np.asarray(parents, np.int32)),
            np.append(self.logprobs, np.asarray(logprobs, np.float32)),
        )

    def ancestor_mask(self) -> np.ndarray:
        """bool[n+1, n+1]: row i+1 sees the root (column 0), node i's ancestors and node i itself."""
        mask = np.eye(len(self) + 1, dtype=np.bool_)
        mask[:, 0] = True
        for row, parent in enumerate(self.parents.tolist(), start=1):
            mask[row, 1:row] = mask[parent + 1, 1:row]
        return mask

    def path(self, node: int) -> tuple[int, ...]:
        """Nodes from below the root down to `node`; () for the root."""
        upwards = []
        while node != ROOT:
            upwards.append(node)
            node = int(self.parents[node])
        return tuple(reversed(upwards))

    def children(self, node: int) -> tuple[int, ...]:
        return tuple(np.flatnonzero(self.parents == node).tolist())

    def child(self, node: int, token: int) -> int | None:
        """The child of `node` (-1: the root) that carries `token`."""
        found = np.flatnonzero((self.parents == node) & (self.tokens == token))
        return int(found[0]) if len(found) else None

    def top(self, count: int) -> tuple[Self, np.ndarray]:
        """The `count` most probable nodes by cumulative log-probability, and their indices here (ascending).

        Always a tree: a parent is at least as probable as its children, and ties go to the earlier node.
        """
        kept = np.sort(most_probable(self.cumulative, count))
        return self.restricted(kept), kept

    def reroot(self, node: int) -> tuple[Self, np.ndarray]:
        """The subtree strictly below `node`, its new root, and the kept indices here (ascending)."""
        kept = np.flatnonzero(is_below(self.parents, node))
        return self.restricted(kept), kept

    def restricted(self, kept: np.ndarray) -> Self:
        """The nodes `kept` (ascending) only; a parent left out becomes the root."""
        parents = renumbered(self.parents, kept)
        logprobs = self.logprobs[kept]
        return type(self)(self.tokens[kept], parents, logprobs, *_sums_along_paths(parents, logprobs))


def most_probable(cumulative: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` greatest values, descending; ties in index order: parents before children."""
    near = np.arange(len(cumulative))
    if 0 < count < len(cumulative):
        near = np.flatnonzero(cumulative >= np.partition(cumulative, -count)[-count])
    return np.asarray(near[np.argsort(-cumulative[near], kind="stable")[: max(count, 0)]])


def bounded_logprobs(logprobs: np.ndarray) -> np.ndarray:
    """Log-probabilities in [-1e4, 0]: rounding can put one a hair above 0, a masked token is at -inf."""
    if np.isnan(logprobs).any():
        raise ValueError("a log-probability is not a number")
    return np.asarray(np.clip(logprobs, _LOWEST_LOGPROB, 0.0))


def is_below(parents: np.ndarray, node: int) -> np.ndarray:
    """bool[n]: which nodes lie strictly below `node`. Pointer doubling: log2(depth) rounds."""
    up = np.append(parents, ROOT)  # the last slot is the root, so that index -1 leads to itself
    up[node] = node
    while not np.array_equal(further := up[up], up):
        up = further
    below: np.ndarray = up[:-1] == node
    if node != ROOT:
        below[node] = False
    return below


def renumbered(parents: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """int32[len(kept)]: parents of the kept nodes in the new numbering, -1 where the parent is not kept."""
    new_index = np.full(len(parents) + 1, ROOT, np.int32)  # the last slot again is the root
    new_index[kept] = np.arange(len(kept), dtype=np.int32)
    return np.asarray(new_index[parents[kept]])


def _check_shapes(tokens: np.ndarray, parents: np.ndarray, logprobs_shape: tuple[int, ...]) -> None:
    shapes = (tokens.shape, parents.shape, logprobs_shape)
    if tokens.ndim != 1 or len(set(shapes)) != 1:
        raise ValueError(f"tokens, parents and logprobs must be equally long lists, got shapes {shapes}")


def _check_tree(tokens: np.ndarray, parents: np.ndarray) -> None:
    astray = np.flatnonzero((parents >= np.arange(len(parents))) | (parents < ROOT))
    if len(astray):
        raise ValueError(f"node {astray[0]} has parent {parents[astray[0]]}: parents come before their children")
    if len(set(zip(parents.tolist(), tokens.tolist(), strict=True))) != len(tokens):
        raise ValueError("two children of one parent carry the same token")


def _sums_along_paths(parents: np.ndarray, logprobs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Depths int32[n] and cumulative log-probabilities float64[n].

    One addition per node on top of its parent's sum: only this order keeps every child at or below its parent
    in floating point, on which `top` relies. Plain lists: a chain leaves nothing to vectorise.
    """
    steps: Sequence[float] = logprobs.tolist()
    depths, sums = [0] * (len(parents) + 1), [0.0] * (len(parents) + 1)  # last slot: the root
    for node, parent in enumerate(parents.tolist()):
        depths[node] = depths[parent] + 1
        sums[node] = sums[parent] + steps[node]
    return np.array(depths[:-1], np.int32), np.array(sums[:-1], np.float64)
