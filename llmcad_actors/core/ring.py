"""Room in a ring of bytes: taken in order, given back in nearly the same order, never in two parts."""

from collections import deque
from dataclasses import dataclass


@dataclass(slots=True)
class _Stretch:
    start: int
    end: int
    in_use: bool = True


class Ring:
    """Who holds which bytes of a buffer of `capacity`. Room comes back once all that was taken before it has."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._taken: deque[_Stretch] = deque()

    def take(self, nbytes: int) -> int | None:
        """Where the next `nbytes` (at least 1) may lie, or None while there is no such room."""
        if nbytes < 1:
            raise ValueError(f"{nbytes} bytes")
        start = self._room_for(nbytes)
        if start is not None:
            self._taken.append(_Stretch(start, start + nbytes))
        return start

    def give_back(self, start: int) -> None:
        """End the use of what was taken at `start`. Raises KeyError where nothing is in use."""
        stretch = next((s for s in self._taken if s.start == start and s.in_use), None)
        if stretch is None:
            raise KeyError(start)
        stretch.in_use = False
        while self._taken and not self._taken[0].in_use:
            self._taken.popleft()

    @property
    def used(self) -> int:
        """Bytes in use or not yet free again."""
        return sum(stretch.end - stretch.start for stretch in self._taken)

    def _room_for(self, nbytes: int) -> int | None:
        if not self._taken:
            return 0 if nbytes <= self.capacity else None
        oldest, head = self._taken[0].start, self._taken[-1].end
        if self._taken[-1].start >= oldest:  # not wrapped round: free are the end and the beginning
            if head + nbytes <= self.capacity:
                return head
            return 0 if nbytes <= oldest else None
        return head if head + nbytes <= oldest else None
