"""What a tree builder does, and the facts a fallback policy decides on after each draft step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np

from llmcad_actors.core.tree import TokenTree


@dataclass(frozen=True, slots=True)
class Growth:
    """The state of a growing tree, in the builder's (uncalibrated) probabilities."""

    steps: int  # draft steps since the last `reroot` or `reset`: a head start does not count
    num_nodes: int  # nodes of the tree that would be submitted now
    best_frontier: float  # largest cumulative probability of a node not yet run: the paper's T_c
    last_confidence: float  # the draft's top probability at the best node of the newest step; 1 before any
    depth: int  # of the deepest node that would be submitted
    exhausted: bool  # no further step can change the tree that would be submitted
    cumulative: np.ndarray  # float64[num_nodes], their cumulative probabilities, descending
    next_gain: float  # tokens that one more step is expected to add to sum(cumulative)

    @classmethod
    def of_all(cls, growths: Sequence[Self]) -> Self:
        """Of several trees that grow in shared steps, as if they were one. At least one is given."""
        if len(growths) == 1:
            return growths[0]
        growing = [each for each in growths if not each.exhausted]
        return cls(
            steps=max(each.steps for each in growths),
            num_nodes=sum(each.num_nodes for each in growths),
            best_frontier=max(each.best_frontier for each in growths),
            last_confidence=max(each.last_confidence for each in growing or growths),
            depth=min(each.depth for each in growing or growths),
            exhausted=not growing,
            cumulative=-np.sort(-np.concatenate([each.cumulative for each in growths])),
            next_gain=sum(each.next_gain for each in growths),
        )


class TreeBuilder(Protocol):
    """Grows a tree of scored candidates; knows no model. Node ids are stable until `reroot` or `reset`."""

    def next_nodes(self, limit: int, beyond: bool = False) -> list[int]:
        """At most `limit` nodes to run through the draft next, best first; [] when nothing is left.

        -1 is the root, which comes first and alone. `beyond`: go on past the tree that would be submitted
        (provisional growth), until the builder is full.
        """

    def expand(self, nodes: Sequence[int], tokens: np.ndarray, logprobs: np.ndarray) -> None:
        """Score the candidates of nodes just run: tokens, logprobs [len(nodes), b], each row descending."""

    def observe(self, path: np.ndarray, bonus: int) -> None:
        """Learn from a verdict, before `reroot` or `reset`: the accepted nodes, root to leaf, and the token after."""

    def submission(self, limit: int | None = None) -> tuple[TokenTree, np.ndarray]:
        """The tree to verify and the builder's id of each of its nodes, int64[n]; its `limit` best nodes only."""

    def reroot(self, node: int) -> np.ndarray:
        """Keep the subtree strictly below `node`, from now on the root (-1). Returns the kept old ids.

        A node that had been run makes a root that counts as run.
        """

    def sibling(self) -> Self:
        """An empty tree of the same kind. What either learns from verdicts, both know."""

    def reset(self) -> None:
        """Forget everything: the root is to be run."""

    def find(self, node: int, token: int) -> int | None:
        """The scored child of `node` (-1: root) with this token."""

    def rows(self, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, parents (-1: root) and depths of scored nodes."""

    def chances(self, nodes: np.ndarray) -> np.ndarray:
        """float64: the cumulative probabilities of scored nodes (-1: root, 1)."""

    def is_expanded(self, node: int) -> bool:
        """Whether the draft has run `node` (-1: root)."""

    def growth(self) -> Growth:
        """The facts now."""

    def __len__(self) -> int:
        """Scored nodes."""
