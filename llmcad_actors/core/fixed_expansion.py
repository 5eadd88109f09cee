"""Trees of one fixed shape: the chain of plain speculative decoding, and SpecInfer's token trees."""

from collections.abc import Sequence

import numpy as np

from llmcad_actors.core.growing_tree import GrowingTree
from llmcad_actors.core.tree import most_probable

SPECINFER_WIDTHS = (1, 1, 3, 1, 1, 1, 1, 1)


class FixedExpansion(GrowingTree):
    """Level by level: every node at depth d gets `widths[d]` children (the root has depth 0)."""

    def __init__(self, widths: Sequence[int] = SPECINFER_WIDTHS, batch: int = 16) -> None:
        if not widths or min(widths) < 1:
            raise ValueError(f"widths must be positive numbers, one per level, got {tuple(widths)}")
        super().__init__(batch, max_scored=4096)
        self.widths = tuple(widths)

    def _frontier(self, limit: int, beyond: bool) -> np.ndarray:
        """The shallowest unexpanded nodes, most probable first. Beyond the shape, the last width goes on."""
        waiting = self._unexpanded()
        depths = self._nodes["depth"][waiting]
        if not beyond and depths.min() >= len(self.widths):
            return np.empty(0, np.int64)
        level = waiting[depths == depths.min()]
        return np.asarray(level[most_probable(self._nodes["cumulative"][level], limit)])

    def _admitted(self, nodes: np.ndarray, logprobs: np.ndarray) -> np.ndarray:
        depths = self._table["depth"][nodes]
        widths = np.array(self.widths)[np.minimum(depths, len(self.widths) - 1)]
        assert widths.max() <= logprobs.shape[1], f"a node needs {widths.max()} candidates, {logprobs.shape[1]} given"
        admitted: np.ndarray = np.arange(logprobs.shape[1]) < widths[:, None]
        return admitted

    def _submitted(self) -> np.ndarray:
        nodes = self._nodes
        inside = np.flatnonzero(nodes["depth"] <= len(self.widths))
        return np.asarray(inside[most_probable(nodes["cumulative"][inside], len(inside))])
