"""What all tree builders share: scored nodes in growable arrays, and the bookkeeping of `TreeBuilder`.

A builder differs from another in three decisions, the abstract methods: which nodes to run next, which of a
node's candidates to score, and which scored nodes to submit. It knows no model and no cache.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Self

import numpy as np

from llmcad_actors.core.growth import Growth
from llmcad_actors.core.tree import ROOT, TokenTree, bounded_logprobs, is_below, renumbered

_NODE = np.dtype(
    [
        ("cumulative", np.float64),  # log-probability of the whole path
        ("token", np.int64),
        ("parent", np.int32),
        ("said", np.float32),  # the draft's own log-probability
        ("logprob", np.float32),  # what the builder makes of it
        ("depth", np.int32),
        ("step", np.int32),  # the draft step that scored it; never decreases with the index
        ("expanded", np.bool_),
    ],
    align=True,
)
_PRIOR_YIELD = 0.7  # share of a node's probability that its submitted children carry, before any is seen ...
_PRIOR_MASS = 0.1  # ... worth this much probability of evidence


class GrowingTree(ABC):
    """Scored nodes with stable ids, until `reroot` or `reset` renumbers them."""

    def __init__(self, batch: int, max_scored: int) -> None:
        """`batch`: nodes per draft step. `max_scored`: growth beyond the submission ends at so many nodes."""
        self.batch = batch
        self.max_scored = max_scored
        self._ranking: np.ndarray | None = None
        self._table = np.zeros(256, _NODE)  # the last row is the root: index -1, depth 0, log-probability 0
        self.reset()

    def sibling(self) -> Self:
        other = copy.copy(self)
        other._table = np.zeros(256, _NODE)
        other.reset()
        return other

    @abstractmethod
    def _frontier(self, limit: int, beyond: bool) -> np.ndarray:
        """int64: nodes to run next, best first, once the root has been run."""

    @abstractmethod
    def _admitted(self, nodes: np.ndarray, logprobs: np.ndarray) -> np.ndarray:
        """bool[k, b]: which candidates of `nodes` to score, at least the first of each."""

    @abstractmethod
    def _submitted(self) -> np.ndarray:
        """int64[n]: the nodes that would be submitted, by descending cumulative probability."""

    def _believed(self, logprobs: np.ndarray) -> np.ndarray:
        """The draft's log-probabilities [k, b] as the builder takes them: at their word, unless it learns."""
        return logprobs

    def observe(self, path: np.ndarray, bonus: int) -> None:
        """Learns nothing, unless overridden."""
        return

    def __len__(self) -> int:
        return self._count

    def next_nodes(self, limit: int, beyond: bool = False) -> list[int]:
        if limit < 1 or (beyond and len(self) >= self.max_scored):
            return []
        if not self.is_expanded(ROOT):
            return [ROOT]
        nodes: list[int] = self._frontier(min(limit, self.batch), beyond).tolist()
        return nodes

    def expand(self, nodes: Sequence[int], tokens: np.ndarray, logprobs: np.ndarray) -> None:
        run, bounded = np.asarray(nodes, np.int64), bounded_logprobs(np.asarray(logprobs, np.float32))
        assert tokens.shape == bounded.shape, f"tokens are {tokens.shape}, their logprobs {bounded.shape}"
        assert len(bounded) == len(run) > 0, f"candidates of {len(bounded)} nodes for {len(run)}"
        assert not any(self.is_expanded(node) for node in nodes), f"some of {nodes} have been run already"
        self._table["expanded"][run] = True
        believed = self._believed(bounded)
        admitted = self._admitted(run, believed)
        self._append(np.repeat(run, admitted.sum(axis=1)), tokens[admitted], bounded[admitted], believed[admitted])
        self._steps += 1

    def submission(self, limit: int | None = None) -> tuple[TokenTree, np.ndarray]:
        nodes, kept = self._nodes, np.sort(self._chosen()[:limit])
        chosen = nodes[kept]
        parents = renumbered(nodes["parent"], kept)
        columns = [chosen[name].copy() for name in ("logprob", "depth", "cumulative")]
        return TokenTree(chosen["token"].copy(), parents, *columns), kept

    def reroot(self, node: int) -> np.ndarray:
        nodes, was_expanded = self._nodes, self.is_expanded(node)
        kept = np.flatnonzero(is_below(nodes["parent"], node))
        below = nodes[kept]
        below["parent"] = renumbered(nodes["parent"], kept)
        below["depth"] -= self._table["depth"][node]
        below["cumulative"] -= self._table["cumulative"][node]
        self.reset()
        self._table[: len(kept)], self._count = below, len(kept)
        self._table["expanded"][ROOT] = was_expanded
        return kept

    def reset(self) -> None:
        self._count, self._steps, self._ranking = 0, 0, None
        self._table["expanded"][ROOT] = False

    def find(self, node: int, token: int) -> int | None:
        nodes = self._nodes
        found = np.flatnonzero((nodes["parent"] == node) & (nodes["token"] == token))
        return int(found[0]) if len(found) else None

    def rows(self, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        chosen = self._nodes[nodes]
        return chosen["token"], chosen["parent"], chosen["depth"]

    def chances(self, nodes: np.ndarray) -> np.ndarray:
        return np.asarray(np.exp(self._table["cumulative"][nodes]))

    def is_expanded(self, node: int) -> bool:
        return bool(self._table["expanded"][node])

    def growth(self) -> Growth:
        nodes, chosen = self._nodes, self._chosen()
        upcoming = self.next_nodes(self.batch)
        return Growth(
            steps=self._steps,
            num_nodes=len(chosen),
            best_frontier=self._best_frontier(),
            last_confidence=self._last_confidence(),
            depth=int(nodes["depth"][chosen].max(initial=0)),
            exhausted=not upcoming,
            cumulative=np.exp(nodes["cumulative"][chosen]),
            next_gain=self._yield_of_newest_step(chosen) * self._probability(np.array(upcoming, np.int64)),
        )

    @property
    def _nodes(self) -> np.ndarray:
        return self._table[: self._count]

    def _chosen(self) -> np.ndarray:
        """`_submitted`, worked out once per state."""
        if self._ranking is None:
            self._ranking = self._submitted()
        return self._ranking

    def _unexpanded(self) -> np.ndarray:
        return np.flatnonzero(~self._nodes["expanded"])

    def _best_frontier(self) -> float:
        if not self.is_expanded(ROOT):
            return 1.0
        return float(np.exp(self._nodes["cumulative"][self._unexpanded()].max(initial=-np.inf)))

    def _newest_step(self) -> np.ndarray:
        """The nodes scored by the newest step that left any: they are the last ones."""
        nodes = self._nodes
        return nodes[np.searchsorted(nodes["step"], nodes["step"][-1]) :] if len(nodes) else nodes

    def _last_confidence(self) -> float:
        newest = self._newest_step()
        return float(np.exp(newest["said"][0])) if len(newest) else 1.0

    def _yield_of_newest_step(self, chosen: np.ndarray) -> float:
        """Submitted probability that the newest step added per probability of the nodes it ran.

        A new node of a full tree pushes out one that is about as probable as the least of those left, so only
        the difference counts. Shrunk towards a prior: a single step is a small sample.
        """
        if not len(chosen):
            return _PRIOR_YIELD
        nodes, newest = self._nodes, self._newest_step()
        probabilities = np.exp(nodes["cumulative"][chosen])
        is_new = chosen >= len(nodes) - len(newest)
        pushed_out = probabilities[-1] if len(chosen) < len(nodes) else 0.0
        gain = float((probabilities[is_new] - pushed_out).sum())
        run = self._probability(np.unique(newest["parent"]))
        return (gain + _PRIOR_YIELD * _PRIOR_MASS) / (run + _PRIOR_MASS)

    def _probability(self, ids: np.ndarray) -> float:
        return float(np.exp(self._table["cumulative"][ids]).sum())

    def _append(self, parents: np.ndarray, tokens: np.ndarray, said: np.ndarray, logprobs: np.ndarray) -> None:
        first, end = self._count, self._count + len(parents)
        self._reserve(end)
        above, new = self._table[parents], self._table[first:end]
        new["token"], new["parent"], new["said"], new["logprob"] = tokens, parents, said, logprobs
        new["cumulative"] = above["cumulative"] + logprobs
        new["depth"], new["expanded"] = above["depth"] + 1, False
        new["step"] = self._table["step"][first - 1] + 1 if first else 0
        self._count, self._ranking = end, None

    def _reserve(self, count: int) -> None:
        if count < len(self._table):
            return
        grown = np.zeros(2 * count, _NODE)
        grown[: self._count], grown[ROOT] = self._nodes, self._table[ROOT]
        self._table = grown
