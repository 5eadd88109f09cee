"""A request under way, as its caller holds it: pieces to iterate over, a result, a way to end it.

Events come from one thread, the dispatcher's; pieces are taken by any thread, or by a coroutine of any event loop.
"""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from typing import Self

from llmcad_actors.core.request import Request
from llmcad_actors.core.stats import Stats
from llmcad_actors.errors import EngineClosedError, LlmcadError
from llmcad_actors.messages import Event, Failed, Finished, Provisional, Tokens
from llmcad_actors.requests.options import RequestOptions
from llmcad_actors.results import Piece, Result, put_together
from llmcad_actors.text.tokenizer import Detokenizer, StopStrings

TICK_S = 1.0  # a waiting thread looks up so often, so that an interruption reaches it

Cancel = Callable[["Generation"], None]
Complete = Callable[["Generation", Stats], Stats]


class Generation:
    """Iterate over it for the pieces of the text, as they are accepted, or ask for `result()`.

    It runs whether somebody looks or not. `cancel()` ends it, and so does leaving it as a context manager.
    """

    def __init__(
        self,
        number: int,
        request: Request,
        options: RequestOptions,
        detokenizer: Detokenizer,
        cancel: Cancel,
        complete: Complete,
    ) -> None:
        """For the engine. cancel: is told when the caller wants no more; complete: adds what only the engine knows."""
        self.number = number
        self.request = request
        self.finish_reason = ""  # "stop" or "length" once it has ended by itself; "cancelled"
        self._options = options
        self._detokenizer, self._stops = detokenizer, StopStrings(options.stop)
        self._cancel, self._complete = cancel, complete
        self._stats = Stats()
        self._error: LlmcadError | None = None
        self._kept: list[Piece] = []  # all that is not provisional
        self._new: deque[Piece] = deque()
        self._has_ended = False
        self._changed = threading.Condition(threading.RLock())
        self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    @property
    def has_ended(self) -> bool:
        return self._has_ended

    @property
    def stats(self) -> Stats:
        """So far; disk and memory figures once it has ended."""
        return self._stats

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def __iter__(self) -> Iterator[Piece]:
        while (piece := self._wait_for_piece()) is not None:
            yield piece

    async def __aiter__(self) -> AsyncIterator[Piece]:
        while True:
            with self._changed:
                piece = self._new.popleft() if self._new else None
                if piece is None and not self._has_ended:
                    woken: asyncio.Future[None] = (loop := asyncio.get_running_loop()).create_future()
                    self._waiting.append((loop, woken))
            if piece is not None:
                yield piece
            elif self._has_ended and not self._new:
                self._raise_error()
                return
            else:
                await woken

    def result(self) -> Result:
        """All of it, once it has ended. Raises what broke it."""
        with self._changed:
            while not self._has_ended:
                self._changed.wait(TICK_S)
        self._raise_error()
        return put_together(self._kept, self.finish_reason, self.stats, self.request.choosing)

    def cancel(self) -> None:
        """Nothing more comes of it. One that has ended is left as it is."""
        if not self._has_ended:
            self._cancel(self)
            self.end("cancelled")

    def hear(self, event: Event) -> None:
        """For the engine: what has happened to the request."""
        if isinstance(event, Provisional):
            if self._options.provisional:
                self._add(Piece(self._detokenizer.peek(event.ids), event.ids, provisional=True))
        elif isinstance(event, Tokens):
            self._stats = event.stats
            text = self._stops.feed(self._detokenizer.feed(event.ids))
            self._add(Piece(text, event.ids, logprobs=event.logprobs))
            if self._stops.hit:
                self._cancel(self)
                self.end("stop")
        elif isinstance(event, Finished):
            self._stats = event.stats
            self.end(event.reason)
        elif isinstance(event, Failed):
            self.end("", event.as_error())

    def end(self, reason: str, error: LlmcadError | None = None) -> None:
        """For the engine: nothing more comes. What was held back, for what would have completed it, is given out."""
        with self._changed:
            if self._has_ended:
                return
            is_given_up = reason == "cancelled" or isinstance(error, EngineClosedError)
            if not is_given_up and (tail := self._stops.feed(self._detokenizer.flush(), final=True)):
                self._add(Piece(tail, ()))
            with suppress(LlmcadError):  # a closed engine has no figures
                self._stats = self._complete(self, self._stats)
            self.finish_reason, self._error, self._has_ended = reason, error, True
            self._wake()

    def _add(self, piece: Piece) -> None:
        with self._changed:
            if not piece.provisional:
                self._kept.append(piece)
            self._new.append(piece)
            self._wake()

    def _wake(self) -> None:
        self._changed.notify_all()
        waiting, self._waiting = self._waiting, []
        for loop, woken in waiting:
            with suppress(RuntimeError):  # a loop that has been closed
                loop.call_soon_threadsafe(_done, woken)

    def _wait_for_piece(self) -> Piece | None:
        with self._changed:
            while not self._new and not self._has_ended:
                self._changed.wait(TICK_S)
            if self._new:
                return self._new.popleft()
        self._raise_error()
        return None

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error


def _done(woken: "asyncio.Future[None]") -> None:
    if not woken.done():
        woken.set_result(None)
