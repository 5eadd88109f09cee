"""Collects what the actors record, every so often and at the end, and hands it on, packed as it comes."""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from llmcad_actors.actors.calls import fetch
from llmcad_actors.errors import DeadlineError, LlmcadError

EVERY_S = 2.0
POLL_TIMEOUT_S = 0.2
EDGE_TIMEOUT_S = 60.0  # at the start and in the end; an actor may have to finish a pass first


class TraceCollector:
    """Switches recording on, drains the actors from a thread of its own, and switches it off in the end.

    An actor that does not answer costs its part of the trace, and never the request.
    """

    def __init__(self, actors: Callable[[], Mapping[str, Any]], write: Callable[[bytes], object]) -> None:
        """`actors`: what runs now, by lane; each has a method trace(goes_on)."""
        self._actors = actors
        self._write = write
        self._calls: dict[str, Any] = {}  # not answered yet
        self._failed: set[str] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="llmcad-trace", daemon=True)
        self.missing: Sequence[str] = ()  # lanes without an answer in the end

    def __enter__(self) -> Self:
        self._ask(goes_on=True)
        self._collect(EDGE_TIMEOUT_S)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(EDGE_TIMEOUT_S)
        self._collect(EDGE_TIMEOUT_S)
        self._ask(goes_on=False)
        self._collect(EDGE_TIMEOUT_S)
        self.missing = tuple(lane for lane in self._actors() if lane in self._calls or lane in self._failed)

    def _run(self) -> None:
        while not self._stop.wait(EVERY_S):
            self._ask(goes_on=True)
            self._collect(POLL_TIMEOUT_S)

    def _ask(self, *, goes_on: bool) -> None:
        for lane, actor in self._actors().items():
            if lane not in self._calls:
                try:
                    self._calls[lane] = actor.trace.remote(goes_on)
                except LlmcadError:  # the engine is being closed
                    self._failed.add(lane)

    def _collect(self, timeout_s: float) -> None:
        """Hand on what has come. A call that takes longer stays open; one that failed is asked again next time."""
        for lane, call in list(self._calls.items()):
            try:
                self._write(fetch(call, timeout_s, f"the {lane}'s trace"))
                self._failed.discard(lane)
            except DeadlineError:
                continue
            except LlmcadError:
                self._failed.add(lane)
            del self._calls[lane]
