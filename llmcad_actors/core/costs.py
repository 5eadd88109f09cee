"""What drafting and passes cost, in seconds, and how that is learnt from what they took.

A round drafts for d seconds and then makes one pass over n nodes. A pass takes as long as the slower of its two
halves, reading the streamed weights (r seconds) and computing (b + a n). The loader reads while the draft works,
until its window is full (w seconds of reading), so

    round(d, n) = d + max(r - min(d, w), b + a n).

While reading is the slower half, drafting within w costs nothing. Under a cap with room for one shard at a time the two
halves take turns, and a pass takes as long as both together.
"""

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import numpy.typing as npt

from llmcad_actors.core.round import Drafting, PassStats

NOT_HIDDEN_ONE_ROW, NOT_HIDDEN = 0.5, 0.7
"""Part of the smaller of reading and computing that adds to the larger: they compete for memory and cores.

A single row is bound by memory, and takes less of the cores.
"""

_NEWEST = 0.2  # weight of a new observation at least; the first replaces the guess
_PRIOR_ROWS = 32.0  # without other evidence, this many rows cost as much as none
_PRIOR_VARIANCE = 64.0  # rows^2: how much spread of rows it takes to outweigh that guess


def together(read_s: npt.ArrayLike, compute_s: npt.ArrayLike, *, overlaps: bool) -> np.ndarray:
    """A pass of these halves, each as it is beside the other: the slower one, or where they take turns both."""
    return np.asarray(np.maximum(read_s, compute_s) if overlaps else np.add(read_s, compute_s))


def beside_each_other(read_s: float, compute_s: float, rows: int, *, overlaps: bool) -> tuple[float, float]:
    """What reading and computing take while both go on, from what each takes alone."""
    if not overlaps:
        return read_s, compute_s
    lost = (NOT_HIDDEN_ONE_ROW if rows == 1 else NOT_HIDDEN) * min(read_s, compute_s)
    return read_s + lost, compute_s + lost


@dataclass(frozen=True, slots=True)
class Costs:
    """The costs of a round, as far as it has come."""

    draft_step_s: float
    pass_read_s: float  # r: reading a pass's streamed weights, all of them
    pass_base_s: float  # b: computing a pass without tree nodes
    pass_node_s: float  # a: computing one node more
    hidden_s: float = 0.0  # w: reading that can go on while the draft works
    drafted_s: float = 0.0  # drafting in this round so far
    pending_rows: int = 0  # committed tokens that the pass computes besides the root: of a prompt
    overlaps: bool = True  # a shard is read while another computes
    drafts_ahead: bool = False  # the draft may go on during the pass, for the next tree
    plain_compute_s: float | None = None  # computing a pass of one row, which has kernels of its own; None: as b
    draft_memory_share: float = 0.0  # of a plain pass, that is saved once the draft's memory holds layers
    num_requests: int = 1  # that the pass serves: each has a root, and yields a token besides its tree's

    @property
    def plain_pass_s(self) -> float:
        """A pass over the roots alone: no tree, no prompt."""
        return float(together(self.pass_read_s, self._plain_compute_s, overlaps=self.overlaps))

    @property
    def draft_row_s(self) -> float:
        """A row of many that the draft runs at once: as much less than the target's as its step is."""
        plain = self.pass_base_s if self.plain_compute_s is None else self.plain_compute_s
        return self.pass_node_s * self.draft_step_s / plain if plain > 0 else 0.0

    def pass_seconds(self, num_nodes: npt.ArrayLike) -> np.ndarray:
        """T(n): a pass whose reading begins with it; one per entry of `num_nodes`."""
        return self._both(self.pass_read_s, num_nodes)

    def round_seconds(self, num_nodes: npt.ArrayLike, more_drafting_s: float = 0.0) -> np.ndarray:
        """The whole round, if `num_nodes` are submitted after `more_drafting_s`."""
        drafting = self.drafted_s + more_drafting_s
        return drafting + self._both(self._left_to_read(drafting), num_nodes)

    def without_prompt(self) -> Self:
        """The same round of a text that is under way."""
        return replace(self, pending_rows=0)

    def waits_for_disk(self, num_nodes: int) -> float:
        """Share of a pass over so many nodes that it is expected to wait for the disk, if drafting hid nothing."""
        whole = float(self.pass_seconds(num_nodes))
        return (whole - float(self._compute_seconds(num_nodes))) / whole if whole else 0.0

    def seconds_without_nodes(self) -> float:
        """The whole round, if nothing is submitted after all."""
        if self.pending_rows:
            return float(self.round_seconds(0))
        left = self._left_to_read(self.drafted_s)
        return self.drafted_s + float(together(left, self._plain_compute_s, overlaps=self.overlaps))

    @property
    def _plain_compute_s(self) -> float:
        if self.num_requests > 1:
            return self.pass_base_s + self.pass_node_s * (self.num_requests - 1)
        return self.pass_base_s if self.plain_compute_s is None else self.plain_compute_s

    def _left_to_read(self, drafting_s: float) -> float:
        return self.pass_read_s - min(drafting_s, self.hidden_s)

    def _both(self, reading: float, num_nodes: npt.ArrayLike) -> np.ndarray:
        return together(reading, self._compute_seconds(num_nodes), overlaps=self.overlaps)

    def _compute_seconds(self, num_nodes: npt.ArrayLike) -> np.ndarray:
        rows = self.pending_rows + self.num_requests - 1 + np.asarray(num_nodes, np.float64)
        return np.asarray(self.pass_base_s + self.pass_node_s * rows)


@dataclass(frozen=True, slots=True)
class CostModel:
    """Exponentially fading averages, and a line through computing time over rows. Starts from guesses.

    Passes of one row are kept apart: they have kernels of their own, and many of them would make the line forget what a
    tree's rows cost. Before a draft step was timed it is taken to be as much faster than a plain pass as planned.
    """

    window_share: float = 0.0  # part of a pass's streamed bytes that the loader's window holds
    draft_step_s: float = 0.01
    read_s: float = 1.0
    mean_rows: float = 32.0
    mean_compute_s: float = 0.1
    variance: float = 0.0  # of rows
    covariance: float = 0.0  # of rows and computing seconds
    num_steps: int = 0
    num_passes: int = 0
    overlaps: bool = True  # a shard is read while another computes
    plain_compute_s: float | None = None  # of a pass of one row; None: as the line says
    num_plain: int = 0
    draft_memory_share: float = 0.0  # as planned, see `Costs`

    def observe_step(self, seconds: float) -> Self:
        """One draft step."""
        fresh = _weight(self.num_steps)
        mean = self.draft_step_s + fresh * (seconds - self.draft_step_s)
        return replace(self, draft_step_s=mean, num_steps=self.num_steps + 1)

    def observe_pass(self, rows: int, seconds: float, read_seconds: float, compute_seconds: float) -> Self:
        """One pass. `read_seconds`: the disk's, for all its bytes; a pass that waits shows the true reading time."""
        if not self.overlaps:
            reading = max(seconds - compute_seconds, 0.0)
        else:
            reading = max(read_seconds, seconds) if seconds > 1.05 * compute_seconds else read_seconds
        fresh = _weight(self.num_passes + self.num_plain)
        model = replace(self, read_s=self.read_s + fresh * (reading - self.read_s))
        return model._observe_row(compute_seconds) if rows == 1 else model._observe_rows(rows, compute_seconds)

    def _observe_rows(self, rows: int, compute_seconds: float) -> Self:
        fresh = _weight(self.num_passes)
        off_rows, off_compute = rows - self.mean_rows, compute_seconds - self.mean_compute_s
        return replace(
            self,
            mean_rows=self.mean_rows + fresh * off_rows,
            mean_compute_s=self.mean_compute_s + fresh * off_compute,
            variance=(1 - fresh) * (self.variance + fresh * off_rows**2),
            covariance=(1 - fresh) * (self.covariance + fresh * off_rows * off_compute),
            num_passes=self.num_passes + 1,
        )

    def _observe_row(self, compute_seconds: float) -> Self:
        known = self.plain_compute_s
        mean = compute_seconds
        if known is not None and self.num_plain:
            mean = known + _NEWEST * (compute_seconds - known)
        step = self.draft_step_s
        if known and not self.num_steps:
            step *= mean / known
        return replace(self, plain_compute_s=mean, draft_step_s=step, num_plain=self.num_plain + 1)

    def after(self, drafting: Drafting, times: PassStats) -> Self:
        """The model after a round. The coordinator does not see the disk, so reading shows in the waits only."""
        model = self
        steps = drafting.steps - (drafting.catch_up_s > 0)
        if steps:
            model = model.observe_step((drafting.seconds - drafting.catch_up_s) / steps)
        hidden = min(drafting.seconds, self.window_share * self.read_s)
        took = times.seconds + hidden if times.stall_s > 0.05 * times.seconds else times.seconds
        return model.observe_pass(times.rows, took, min(self.read_s, took), times.compute_s)

    def costs(
        self, drafted_s: float = 0.0, pending_rows: int = 0, *, num_requests: int = 1, drafts_ahead: bool = False
    ) -> Costs:
        slope, plain = self._seconds_per_row(), self.plain_compute_s
        base = self.mean_compute_s - slope * (self.mean_rows - 1)  # the root is a row too
        if plain is not None and self.num_passes and not self.num_plain:
            plain = min(plain, base)  # what was planned, and what trees' passes show: it is timed rather once too often
        return Costs(
            draft_step_s=self.draft_step_s,
            pass_read_s=self.read_s,
            pass_base_s=base,
            pass_node_s=slope,
            hidden_s=self.window_share * self.read_s,
            drafted_s=drafted_s,
            pending_rows=pending_rows,
            overlaps=self.overlaps,
            drafts_ahead=drafts_ahead,
            plain_compute_s=plain,
            draft_memory_share=self.draft_memory_share,
            num_requests=num_requests,
        )

    def _seconds_per_row(self) -> float:
        """Least squares with a prior, kept where neither a row nor a pass without rows has a negative cost."""
        guess = self.mean_compute_s / (self.mean_rows + _PRIOR_ROWS)
        if self.plain_compute_s is not None and self.num_plain and self.mean_rows > 1:
            guess = max(0.0, self.mean_compute_s - self.plain_compute_s) / (self.mean_rows - 1)
        slope = (self.covariance + _PRIOR_VARIANCE * guess) / (self.variance + _PRIOR_VARIANCE)
        return min(max(slope, 0.0), self.mean_compute_s / max(self.mean_rows, 1.0))


def _weight(num_before: int) -> float:
    return max(_NEWEST, 1.0 / (num_before + 1))
