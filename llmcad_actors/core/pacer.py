"""The paper's branch pacer (section 1): branches grow in proportion to how likely they are.

A branch is a line of best candidates; every other candidate above the threshold opens a branch of its own.
With M nodes in the tree, branch i with the cumulative probability C_i at its tip deserves L_i = M C_i / sum(C)
of them. It owns T_i: those since it was opened. The branches that lack most (L_i - T_i) are extended.
"""

import numpy as np

from llmcad_actors.core.growing_tree import GrowingTree
from llmcad_actors.core.tree import ROOT, most_probable


class BranchPacer(GrowingTree):
    """`batch` branches are extended per draft step; the paper's devices extend one."""

    def __init__(self, max_nodes: int, threshold: float = 0.3, batch: int = 1) -> None:
        """`threshold`: probability above which a candidate opens a branch."""
        super().__init__(batch, max_scored=max(64 * max_nodes, 4096))
        self.max_nodes = max_nodes
        self.threshold = threshold

    def _frontier(self, limit: int, beyond: bool) -> np.ndarray:
        if len(self) >= self.max_nodes and not beyond:
            return np.empty(0, np.int64)
        tips = self._unexpanded()
        return np.asarray(tips[most_probable(self._shortfalls(tips), limit)])

    def _admitted(self, nodes: np.ndarray, logprobs: np.ndarray) -> np.ndarray:
        admitted: np.ndarray = logprobs > np.log(self.threshold)
        admitted[:, 0] = True
        return admitted

    def _submitted(self) -> np.ndarray:
        return most_probable(self._nodes["cumulative"], self.max_nodes)

    def _shortfalls(self, tips: np.ndarray) -> np.ndarray:
        """float64[tips]: L_i - T_i of the branch that ends at each tip. Every branch has one."""
        branches = branches_of(self._nodes["parent"])
        owned = np.bincount(branches, minlength=len(self))[branches[tips]]
        confidences = np.exp(self._nodes["cumulative"][tips] - self._nodes["cumulative"][tips].max(initial=-np.inf))
        return np.asarray(len(self) * confidences / confidences.sum() - owned)


def branches_of(parents: np.ndarray) -> np.ndarray:
    """int64[n]: the branch of each node, named after its first node. A first child continues its parent's."""
    is_first = np.zeros(len(parents), np.bool_)
    is_first[np.unique(parents, return_index=True)[1]] = True
    up = np.where(is_first & (parents != ROOT), parents, np.arange(len(parents)))
    while not np.array_equal(further := up[up], up):
        up = further
    return up
