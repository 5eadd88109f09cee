"""A cap that was passed all the same is owned up to: said at once when nothing more can be given up, and counted.

Decisions only: who measures is elsewhere.
"""

from collections.abc import Callable

from llmcad_actors.core.sizes import format_size

NOTABLY = 32  # said again once the excess has grown by one part in so many of the cap
PATIENCE = 10  # samples above the cap in a row, after which it is said though help is on its way


class Overrun:
    """How far samples of memory went above the cap since `begin`."""

    def __init__(self, cap_bytes: int, warn: Callable[[str], object]) -> None:
        """`warn` is told in a sentence, once, and again when it gets notably worse."""
        self._cap = cap_bytes
        self._warn = warn
        self.begin()

    def begin(self) -> None:
        """A new request: its excess is its own, and it is told anew."""
        self.exceeded_bytes, self._said, self._in_a_row = 0, 0, 0

    def record(self, used_bytes: int) -> None:
        """One sample."""
        self.exceeded_bytes = max(self.exceeded_bytes, used_bytes - self._cap)

    def say(self, used_bytes: int, helped: bool) -> None:
        """Warn of a sample above the cap. helped: shards are being given up; it may be below the cap soon."""
        over = used_bytes - self._cap
        self._in_a_row = self._in_a_row + 1 if over > 0 else 0
        is_worse = over > (self._said + self._cap // NOTABLY if self._said else 0)
        if is_worse and not (helped and self._in_a_row < PATIENCE):
            self._said = over
            used, cap, excess = map(format_size, (used_bytes, self._cap, over))
            self._warn(
                f"memory use of {used} is above the cap of {cap} by {excess}, and nothing more can be given up; "
                f"where that is too much, end this run and give a smaller --max-context or --max-nodes"
            )
