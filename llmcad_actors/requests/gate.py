"""Whether an engine is open. Once it is closed, it stays closed.

A call on the actors is made inside `call()`: one that fails because the engine was closed meanwhile says so.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from llmcad_actors.errors import EngineClosedError

CLOSED = "the engine is closed; launch another one"


class Gate:
    """Safe to use from any thread."""

    def __init__(self) -> None:
        self.is_closed = False

    def check_open(self, cause: Exception | None = None) -> None:
        """Raises `EngineClosedError`."""
        if self.is_closed:
            raise EngineClosedError(CLOSED) from cause

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
        self.is_closed = True
