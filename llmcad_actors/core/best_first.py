"""Best-first trees: the default builder (SpecExec, OPT-Tree).

If the draft's probabilities are taken at their word, the expected number of accepted tokens of a tree is the
sum of its nodes' cumulative probabilities. The n most probable prefixes maximise it, and are always a tree.
"""

import numpy as np

from llmcad_actors.core.growing_tree import GrowingTree
from llmcad_actors.core.sharpness import Sharpness
from llmcad_actors.core.tree import ROOT, most_probable

_LEAST_LOGPROB = float(np.log(1e-4))  # a candidate below it is worth no node of any pass


class BestFirst(GrowingTree):
    """Each step runs the `batch` most probable nodes not yet run, wherever they are in the tree."""

    def __init__(self, max_nodes: int, batch: int = 8, children: int = 16, sharpens: bool = False) -> None:
        """`max_nodes`: of a submitted tree. `children`: candidates scored per node at most.

        sharpens: learn from the verdicts how much surer the target is than the draft (`Sharpness`).
        """
        super().__init__(batch, max_scored=max(64 * max_nodes, 4096))
        self.max_nodes = max_nodes
        self.children = children
        self.sharpens = sharpens
        self._learnt = [Sharpness()]  # siblings share it

    @property
    def sharpness(self) -> Sharpness:
        return self._learnt[0]

    def observe(self, path: np.ndarray, bonus: int) -> None:
        if self.sharpens:
            chosen = [*self._nodes["token"][path].tolist(), bonus]
            for node, token in zip([ROOT, *path.tolist()], chosen, strict=True):
                self._observe_choice(node, token)

    def _observe_choice(self, node: int, token: int) -> None:
        """What was never run named no candidates."""
        children = self._nodes[self._nodes["parent"] == node]
        if self.is_expanded(node) and len(children):
            found = np.flatnonzero(children["token"] == token)
            self._learnt[0] = self.sharpness.after(children["said"], int(found[0]) if len(found) else None)

    def _believed(self, logprobs: np.ndarray) -> np.ndarray:
        return self.sharpness.apply(logprobs) if self.sharpens else logprobs

    def _frontier(self, limit: int, beyond: bool) -> np.ndarray:
        """Only a node of the submission, and better than its last one, can have children that get into it."""
        scores = self._nodes["cumulative"]
        if beyond:
            waiting = self._unexpanded()
            return np.asarray(waiting[most_probable(scores[waiting], limit)])
        chosen = self._chosen()
        bar = scores[chosen[-1]] if len(chosen) == self.max_nodes else -np.inf
        can_gain = ~self._nodes["expanded"][chosen] & (scores[chosen] > bar)
        return np.asarray(chosen[can_gain][:limit])

    def _admitted(self, nodes: np.ndarray, logprobs: np.ndarray) -> np.ndarray:
        admitted: np.ndarray = logprobs >= _LEAST_LOGPROB
        admitted[:, self.children :] = False
        admitted[:, 0] = True
        return admitted

    def _submitted(self) -> np.ndarray:
        return most_probable(self._nodes["cumulative"], self.max_nodes)
