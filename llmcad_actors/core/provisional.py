"""Whether drafting ahead is worth it, and how far: it must cost the pass next to nothing, or save much.

While the loader fills its window, drafting between passes is hidden behind reading, and drafting ahead saves nothing.
Else, drafting during a pass takes only what the others leave of the cores. Two cases leave nothing. A pass that is
bound by computing, not by reading, needs all cores itself: what drafting ahead saves of a cheap draft is less than what
it takes away. And on a machine that other programs keep busy, a draft step that was begun may outlast the pass by far.
"""

import math
from dataclasses import dataclass, replace
from typing import Self

from llmcad_actors.core.costs import Costs

TOLERATED_SHARE = 0.1  # of a pass, that the verdict may wait for a draft step to end
LEAST_WAIT_SHARE = 0.2  # of a pass, that it waits for the disk: less is a pass bound by computing
DEAR_STEP_SHARE = 0.02  # of a pass, that a draft step takes: such a draft is worth some slowness
LEAST_SAVING = 0.1  # of drafting, that reading does not hide: less is not worth saving
LONGEST_PAUSE = 32  # passes
WORK_SHARE = 0.05  # of a pass, that drafting ahead works
LEAST_STEPS = 20  # ahead, however dear: a draft whose step is a twentieth of a pass works through it


@dataclass(frozen=True, slots=True)
class Allowance:
    """How far drafting ahead of one pass goes."""

    steps: int
    seconds: float = math.inf  # a step that would end later is not begun: the verdict would wait for it

    def has_room(self, steps: int, elapsed_s: float, next_s: float) -> bool:
        """For `next_s` of work more, after `steps` in `elapsed_s`."""
        return steps < self.steps and elapsed_s + next_s < self.seconds


def allowance(pass_s: float, draft_step_s: float, last_pass_s: float = math.inf) -> Allowance:
    """For a pass that is thought to take `pass_s`; what the last one really took says when it will end."""
    steps = max(LEAST_STEPS, int(WORK_SHARE * pass_s / draft_step_s)) if draft_step_s > 0 else LEAST_STEPS
    return Allowance(steps, last_pass_s)


def is_worth_it(costs: Costs, num_nodes: int) -> bool:
    """Whether to draft ahead during a pass over so many nodes.

    It must save something: drafting between passes that is hidden behind reading costs nothing there. And the pass must
    leave time on the cores, as it waits for the disk, or the draft must be dear.
    """
    if not costs.drafts_ahead:
        return False
    drafting, at_first = LEAST_STEPS * costs.draft_step_s, replace(costs, drafted_s=0.0)
    shows = float(at_first.round_seconds(num_nodes, drafting) - at_first.round_seconds(num_nodes))
    if shows < LEAST_SAVING * drafting:
        return False
    is_dear = costs.draft_step_s >= DEAR_STEP_SHARE * float(costs.pass_seconds(num_nodes))
    return is_dear or costs.waits_for_disk(num_nodes) >= LEAST_WAIT_SHARE


@dataclass(frozen=True, slots=True)
class Patience:
    """How long drafting ahead pauses after verdicts had to wait for it; each such pass in a row doubles the pause."""

    pause: int = 0  # passes still to go without
    disappointments: int = 0  # in a row

    @property
    def is_over(self) -> bool:
        """Drafting ahead pauses."""
        return self.pause > 0

    def after(self, pass_s: float, late_s: float) -> Self:
        """After a pass whose verdict waited `late_s` for a draft step to end; one without drafting shows nothing."""
        if self.is_over:
            return type(self)(self.pause - 1, self.disappointments)
        if late_s <= TOLERATED_SHARE * pass_s:
            return type(self)()
        return type(self)(min(2 ** (self.disappointments + 1), LONGEST_PAUSE), self.disappointments + 1)
