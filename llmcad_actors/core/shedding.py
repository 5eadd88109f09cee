"""When memory gets short, pinned shards are given up; when there has been room for a while, they are taken back.

A shard given up is streamed like the others: slower, and the output is the same. Decisions only: who measures, and
who carries them out, is elsewhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

PATIENCE_PASSES = 4
MOST_PATIENCE_PASSES = 64
CAP_MARGIN = 128  # of the cap, one part in so many
FREE_MARGIN = 64  # of the machine's memory, one part in so many ...
MOST_FREE_MARGIN_BYTES = 256 << 20  # ... and no more than this


@dataclass(frozen=True, slots=True)
class MemorySample:
    """Bytes at one moment."""

    used: int  # by llmcad
    cap: int  # what it may use
    free: int  # what the machine, or the cgroup, has left
    limit: int  # what the machine, or the cgroup, has in all

    @property
    def room(self) -> int:
        """What may still be taken; below 0: what must be given back."""
        margin = min(self.limit // FREE_MARGIN, MOST_FREE_MARGIN_BYTES)
        return min(self.cap - self.cap // CAP_MARGIN - self.used, self.free - margin)


@dataclass(frozen=True, slots=True)
class Shedding:
    """How many of the pinned shards are held. `after` is asked only once the last answer has been carried out."""

    sizes: tuple[int, ...]  # bytes of the shards that may be pinned; the first are held longest
    held: int
    changed_at: int | None = None  # pass from which the wait counts; None: from the next sample
    patience: int = PATIENCE_PASSES  # passes before one is taken back
    has_taken_back: bool = False  # since the last was given up
    later: int = 0  # so many, the last ones, have no room yet: the draft has it

    @classmethod
    def of(cls, sizes: Sequence[int], later: Sequence[int] = ()) -> Self:
        """All of `sizes` are held. later: bytes of those that may be pinned once the draft has ended."""
        return cls((*sizes, *later), len(sizes), later=len(later))

    @property
    def most(self) -> int:
        """How many may be held."""
        return len(self.sizes) - self.later

    def without_draft(self) -> Self:
        """All are to be held, now that the draft has ended."""
        return replace(self, held=len(self.sizes), later=0, changed_at=None)

    def after(self, sample: MemorySample, passes: int) -> Self:
        """The successor, after `passes` passes in all.

        Enough shards are given up at once. One at a time is taken back, where there is room for two, and later each
        time that it did not last.
        """
        if sample.room < 0:
            return self._given_up(-sample.room)
        if self.changed_at is None:
            return replace(self, changed_at=passes)
        is_calm = passes - self.changed_at >= self.patience
        if self.held < self.most and is_calm and sample.room >= 2 * self.sizes[self.held]:
            return replace(self, held=self.held + 1, changed_at=None, has_taken_back=True)
        return self

    def _given_up(self, short: int) -> Self:
        held = self.held
        while held and short > 0:
            held -= 1
            short -= self.sizes[held]
        patience = min(2 * self.patience, MOST_PATIENCE_PASSES) if self.has_taken_back else self.patience
        return replace(self, held=held, changed_at=None, patience=patience, has_taken_back=False)
