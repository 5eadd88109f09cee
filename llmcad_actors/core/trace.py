"""What an actor did when: spans in a small bounded memory, free of charge while nobody asks for them.

An actor has one recorder and one lane of the timeline. All recorders of a trace read the same clock
(`time.monotonic` is one for the whole machine). Knows neither files nor who collects the events.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Span = tuple[str, float, float, dict[str, Any]]
"""Name, start and end in seconds, and what else is known of it."""

CAPACITY = 20_000


@dataclass(frozen=True, slots=True)
class TraceBatch:
    """Spans of one lane since it was last drained, in the order in which they ended."""

    lane: str
    spans: tuple[Span, ...]
    num_dropped: int  # spans that found the memory full


class Recorder:
    """Records while it is on. Safe to use from several threads."""

    def __init__(self, lane: str, clock: Callable[[], float], capacity: int = CAPACITY) -> None:
        self.lane = lane
        self.now = clock
        self.is_on = False
        self._capacity = capacity
        self._spans: deque[Span] = deque()
        self._num_dropped = 0

    def add(self, name: str, start: float, end: float | None = None, **data: Any) -> None:
        """A span that began at `start` and ends now, or at `end`; nothing while off."""
        if not self.is_on:
            return
        if len(self._spans) >= self._capacity:
            self._num_dropped += 1
            return
        self._spans.append((name, start, self.now() if end is None else end, data))

    def mark(self, name: str, **data: Any) -> None:
        """A moment."""
        if self.is_on:
            now = self.now()
            self.add(name, now, now, **data)

    def drain(self, *, goes_on: bool) -> TraceBatch:
        """Take out what was recorded, and record on or stop. The first call switches on; it finds nothing."""
        self.is_on = goes_on
        spans = tuple(self._spans.popleft() for _ in range(len(self._spans)))
        dropped, self._num_dropped = self._num_dropped, 0
        return TraceBatch(self.lane, spans, dropped)
