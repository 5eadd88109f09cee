"""Whether drafting ahead is worth it: it must not hold up the verdict.

Drafting during a pass takes only what the others leave of the cores. On a machine that other programs keep busy that
is next to nothing, and a draft step that was begun may outlast the pass by far. Then the next passes go without.
"""

from dataclasses import dataclass
from typing import Self

TOLERATED_SHARE = 0.1  # of a pass, that the verdict may wait for a draft step to end
LONGEST_PAUSE = 32  # passes


@dataclass(frozen=True, slots=True)
class Patience:
    """How long drafting ahead pauses; each delay in a row doubles the pause."""

    pause: int = 0  # passes still to go without
    delays: int = 0  # in a row

    @property
    def is_over(self) -> bool:
        """Drafting ahead pauses."""
        return self.pause > 0

    def after(self, late_s: float, pass_s: float) -> Self:
        """After a pass of `pass_s` whose verdict waited `late_s` for the draft."""
        if self.is_over:
            return type(self)(self.pause - 1, self.delays)
        if late_s <= TOLERATED_SHARE * pass_s:
            return type(self)()
        return type(self)(min(2 ** (self.delays + 1), LONGEST_PAUSE), self.delays + 1)
