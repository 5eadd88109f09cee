"""How much of this machine other programs use while something is measured."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

PROC = Path("/proc")
BUSY_SHARE = 0.1  # of the usable cores, in use by others, from which figures are no longer those of a quiet machine
USER, NICE, SYSTEM, IRQ, SOFTIRQ, STEAL = 0, 1, 2, 5, 6, 7  # columns of /proc/stat; idle and waiting are left out


@dataclass(frozen=True, slots=True)
class Taken:
    """When something was measured, and beside what."""

    at: str  # ISO 8601, UTC
    busy_cores: float | None = None  # in use by other programs, on average; None: nobody looked
    cores: int = 0  # usable ones

    @property
    def is_busy(self) -> bool:
        return self.busy_cores is not None and self.busy_cores > BUSY_SHARE * self.cores

    @property
    def date(self) -> str:
        return self.at[:10]

    def __str__(self) -> str:
        """ "2026-11-25, quiet machine"; "2026-11-25, other programs used 1.4 of 2 cores"."""
        if self.busy_cores is None:
            return f"{self.date}, load unknown"
        busy = f"other programs used {self.busy_cores:.1f} of {self.cores} cores"
        return f"{self.date}, {busy if self.is_busy else 'quiet machine'}"


class LoadWatch:
    """From its making on: what others compute on the cores that this process may use.

    reads_disk: what is measured reads a disk, for which the kernel itself may have to compute (to decrypt, say); then
    only what programs compute counts.
    """

    def __init__(
        self, *, reads_disk: bool = False, proc: Path = PROC, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._proc, self._reads_disk, self._clock = proc, reads_disk, clock
        self._began, self._all, self._own = clock(), self._busy_s(), self._own_s()

    def taken(self) -> Taken:
        """Up to now. Children of this process count as its own once they have ended and been waited for."""
        seconds, cores = self._clock() - self._began, len(_usable())
        busy = self._busy_s()
        at = datetime.now(UTC).isoformat(timespec="seconds")
        if busy is None or self._all is None or seconds <= 0:
            return Taken(at, None, cores)
        others = busy - self._all - (self._own_s() - self._own)
        return Taken(at, round(max(0.0, others / seconds), 2), cores)

    def _busy_s(self) -> float | None:
        """Seconds that the usable cores have computed since the machine started; None where /proc does not tell."""
        columns = (USER, NICE, STEAL) if self._reads_disk else (USER, NICE, SYSTEM, IRQ, SOFTIRQ, STEAL)
        try:
            lines = [line.split() for line in (self._proc / "stat").read_text().splitlines()]
            names = {f"cpu{number}" for number in _usable()}
            ticks = [int(words[1 + column]) for words in lines if words[0] in names for column in columns]
        except (OSError, ValueError, IndexError):
            return None
        return sum(ticks) / os.sysconf("SC_CLK_TCK") if ticks else None

    def _own_s(self) -> float:
        times = os.times()
        own = times.user + times.children_user
        return own if self._reads_disk else own + times.system + times.children_system


def _usable() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
