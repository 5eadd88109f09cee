"""Calling actors: every wait has a deadline, every failure becomes one of our exceptions, and no call outlives its Ray.

Ray answers a call that comes when it has ended by starting another one with its own defaults. So whoever calls from
the process that started Ray does it over a `Line`, which is cut before Ray ends. Inside an actor Ray lives as long as
the process does.
"""

import asyncio
import re
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

import llmcad_actors.errors as errors
from llmcad_actors.actors.ray_log import named_by_environment, note
from llmcad_actors.errors import ActorFailure, DeadlineError, LlmcadError, RuntimeFailure

SLICE_S = 0.25  # of a wait, after which it looks whether the line has been cut
ENDED = "the engine's Ray has ended; launch another engine"
MOST_QUOTED = 200  # characters
MOST_DETAILS = 2000
WHY_IT_DIED = " (its process crashed, or was killed: by the kernel, if memory ran out)"

_OURS = re.compile(r"llmcad_actors\.errors\.(\w+): (.*)")


class Line:
    """The way from this process to the actors of one Ray. Once cut, it lets no call through, from whatever thread."""

    def __init__(self, log: Path | None = None) -> None:
        """`log`: where Ray's messages go; ours name it."""
        self.log = log
        self._state = threading.Condition(threading.RLock())
        self.is_cut = False
        self._num_inside = 0

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Around one call of Ray. Raises `RuntimeFailure` when the line has been cut, or Ray ended by someone else."""
        with self._state:
            if self.is_cut or not ray.is_initialized():
                raise RuntimeFailure(ENDED)
            self._num_inside += 1
        try:
            yield
        finally:
            with self._state:
                self._num_inside -= 1
                self._state.notify_all()

    def cut(self, timeout_s: float = 4 * SLICE_S) -> None:
        """Let nothing through from now on; returns when the calls under way have come back, or so much later."""
        with self._state:
            self.is_cut = True
            self._state.wait_for(lambda: self._num_inside == 0, timeout_s)

    def end(self, actors: Iterable["Remote"]) -> None:
        """Cut the line and kill the actors behind it, if it has not been cut before."""
        with self._state:
            was_cut, self.is_cut = self.is_cut, True
        for actor in () if was_cut or not ray.is_initialized() else actors:
            with suppress(Exception):  # already dead is what we want
                ray.kill(actor.handle)
        self.cut()


class Remote:
    """An actor on a line: `remote.method.remote(...)` is `Pending`. Raises `RuntimeFailure` once the line is cut."""

    def __init__(self, line: Line, handle: Any) -> None:
        self.line = line
        self.handle = handle

    def kill(self) -> None:
        """End it, whatever it does. Raises `RuntimeFailure` once the line is cut."""
        with self.line.inside():
            ray.kill(self.handle)

    def __getattr__(self, name: str) -> "RemoteMethod":
        if name.startswith("_"):
            raise AttributeError(name)
        return RemoteMethod(self.line, getattr(self.handle, name))


class RemoteMethod:
    """A method of an actor on a line."""

    def __init__(self, line: Line, method: Any) -> None:
        self._line = line
        self._method = method

    def remote(self, *arguments: Any) -> "Pending":
        """Begin the call. Raises `RuntimeFailure` once the line is cut."""
        with self._line.inside():
            return Pending(self._line, self._method.remote(*arguments))


class Pending:
    """What an actor will answer, over a line."""

    def __init__(self, line: Line, reference: Any) -> None:
        self.line = line
        self._reference = reference

    def is_done(self) -> bool:
        """Whether the answer is there. Raises `RuntimeFailure` once the line is cut."""
        with self.line.inside():
            return bool(ray.wait([self._reference], timeout=0)[0])

    def get(self, timeout_s: float) -> Any:
        """`ray.get`, in slices."""
        deadline = time.monotonic() + timeout_s
        while True:
            left_s = deadline - time.monotonic()
            with self.line.inside():
                try:
                    return ray.get(self._reference, timeout=max(0.0, min(left_s, SLICE_S)))
                except GetTimeoutError:
                    if left_s <= SLICE_S:
                        raise


def fetch(call: Any, timeout_s: float, what: str) -> Any:
    """The result of an actor call; raises `DeadlineError`, `ActorFailure`, or the actor's own `LlmcadError`.

    `RuntimeFailure` when the call's line has been cut.
    """
    line = call.line if isinstance(call, Pending) else None
    try:
        return call.get(timeout_s) if line else ray.get(call, timeout=timeout_s)
    except GetTimeoutError:
        raise DeadlineError(f"{what} did not come within {timeout_s:.0f} s") from None
    except RayError as error:
        if line and line.is_cut:  # the actor's end is what was wanted
            raise RuntimeFailure(ENDED) from None
        raise as_ours(error, what, line.log if line else None) from None


async def fetch_async(ref: Any, timeout_s: float, what: str) -> Any:
    """`fetch` for the event loop, inside an actor."""
    try:
        return await asyncio.wait_for(asyncio.wrap_future(ref.future()), timeout_s)
    except TimeoutError:
        raise DeadlineError(f"{what} did not come within {timeout_s:.0f} s") from None
    except RayError as error:
        raise as_ours(error, what) from None


def as_ours(error: RayError, what: str, log: Path | None = None) -> LlmcadError:
    """Notes in the log what Ray says; `log`: default what the environment names."""
    if isinstance(error, RayTaskError) and isinstance(error.cause, LlmcadError):
        return error.cause
    if isinstance(error, RayTaskError):
        return failure(f"{what} failed: {error.cause!r}", str(error), log)
    if isinstance(error, RayActorError):
        last = str(error).strip().splitlines()[-1]
        return _of_start(last) or failure(f"{what} failed: the actor died{WHY_IT_DIED}", str(error), log)
    return failure(f"{what} failed: {str(error)[:MOST_QUOTED]}", str(error), log)


def _of_start(last: str) -> LlmcadError | None:
    """An error of ours that an actor's start raised; Ray hands over its name and message alone."""
    found = _OURS.match(last)
    kind = getattr(errors, found[1], None) if found else None
    if found is None or not isinstance(kind, type) or not issubclass(kind, LlmcadError):
        return None
    return kind(found[2])


def failure(message: str, details: str = "", log: Path | None = None) -> ActorFailure:
    """The error with this message, which also names the log that details are noted in; without a log, has them."""
    if (place := log or named_by_environment()) is None:
        return ActorFailure(f"{message}\n{details[:MOST_DETAILS]}".strip())
    note(place, f"{message}\n{details}")
    return ActorFailure(f"{message}; details are in {place}")
