"""Who may use an engine: one request at a time, and nobody once it is closed. Knows no Ray and no text.

    open, free  --request-->  open, busy  --its end-->  open, free
    any         --close-->    closed, for good

A call on the actors is made inside `call()`: one that fails because the engine was closed meanwhile says so.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from llmcad_actors.errors import EngineBusyError, EngineClosedError

CLOSED = "the engine is closed; launch another one"
BUSY = (
    "the engine is busy with another request, and does one at a time: wait for that one to end; a stream that is still "
    "open ends when it is read to its end, or closed with stream.close()"
)


class Turn:
    """Safe to use from any thread, and, as a generator's end may come anywhere, from within itself."""

    def __init__(self) -> None:
        self._state = threading.RLock()
        self._is_closed = False
        self._is_taken = False

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    def check_open(self, cause: Exception | None = None) -> None:
        """Raises `EngineClosedError`."""
        if self._is_closed:
            raise EngineClosedError(CLOSED) from cause

    def check(self) -> None:
        """Raises `EngineClosedError` or `EngineBusyError` where a request could not begin now."""
        with self._state:
            self.check_open()
            if self._is_taken:
                raise EngineBusyError(BUSY)

    @contextmanager
    def request(self) -> Iterator[None]:
        """Of one request, from its beginning to its end. Raises as `check`."""
        with self._state:
            self.check()
            self._is_taken = True
        try:
            yield
        finally:
            with self._state:
                self._is_taken = False

    @contextmanager
    def call(self) -> Iterator[None]:
        """Of one call on the actors. Raises `EngineClosedError`, also for whatever broke because of the close."""
        self.check_open()
        try:
            yield
        except Exception as error:
            self.check_open(error)
            raise

    def close(self) -> None:
        """Let nothing begin any more."""
        with self._state:
            self._is_closed = True
