"""Brings events to the requests that they are of: one thread, which waits where nothing is under way."""

import threading
from collections.abc import Callable, Sequence

from llmcad_actors.errors import EngineClosedError, LlmcadError, RuntimeFailure
from llmcad_actors.messages import DraftEnded, Event, Failed
from llmcad_actors.requests.gate import CLOSED
from llmcad_actors.requests.generation import Generation

Poll = Callable[[], Sequence[tuple[int, Event]]]


class Dispatcher:
    """The requests under way. Safe to use from any thread."""

    def __init__(
        self, poll: Poll, explain: Callable[[LlmcadError], LlmcadError], draft_ended: Callable[[], None]
    ) -> None:
        """poll: events of any request, after a short wait; explain: what an error is really due to."""
        self._poll, self._explain, self._draft_ended = poll, explain, draft_ended
        self._open: dict[int, Generation] = {}
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="llmcad dispatcher", daemon=True)
        self._thread.start()

    @property
    def num_open(self) -> int:
        return len(self._open)

    def add(self, generation: Generation) -> None:
        with self._changed:
            self._open[generation.number] = generation
            self._changed.notify_all()

    def remove(self, generation: Generation) -> None:
        """It has been cancelled."""
        with self._changed:
            self._open.pop(generation.number, None)

    def close(self) -> None:
        """End the thread; what is under way fails with `EngineClosedError`."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._fail_all(EngineClosedError(CLOSED))

    def join(self, timeout_s: float) -> None:
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while self._wait_for_work():
            try:
                events = self._poll()
            except LlmcadError as error:
                self._fail_all(error)
                continue
            for number, event in events:
                try:
                    self._bring(number, event)
                except Exception as error:  # a bug of ours: who waits must hear of it, and others must get theirs
                    self._give_up(number, RuntimeFailure(f"the engine broke: {error!r}"))

    def _wait_for_work(self) -> bool:
        with self._changed:
            while not (self._open or self._is_closed):
                self._changed.wait()
        return not self._is_closed

    def _bring(self, number: int, event: Event) -> None:
        if isinstance(event, DraftEnded):
            self._draft_ended()
        elif (generation := self._open.get(number)) is not None:
            if isinstance(event, Failed):
                generation.end("", self._explain(event.as_error()))
            else:
                generation.hear(event)
            if generation.has_ended:
                self.remove(generation)

    def _give_up(self, number: int, error: LlmcadError) -> None:
        if (generation := self._open.get(number)) is not None:
            self.remove(generation)
            generation.end("cancelled", error)

    def _fail_all(self, error: LlmcadError) -> None:
        with self._changed:
            failed, self._open = list(self._open.values()), {}
        for generation in failed:
            generation.end("", self._explain(error))
