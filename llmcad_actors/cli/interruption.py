"""How the command ends when it is told to: by Ctrl-C (SIGINT), SIGTERM, or a terminal that is closed (SIGHUP).

The first signal is raised in the main thread, so that everything is closed in order. The second one, or the first while
Ray starts (which cannot be broken off in order) or when closing takes too long, ends every process below this one, and
this one, at once. Signals are for a program to handle, so this is for the command line alone, never for the library.
"""

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

PATIENCE_S = 8.0  # with closing in order
START_PATIENCE_S = 1.0  # with the main thread, which may be held up in the start of Ray
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """Told to end by a signal. What is in between may make a plain `KeyboardInterrupt` of it."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside the block, the first signal raises `Interrupted`, and the second ends everything at once.

    After the block, where this process ends by itself, the first one does. A signal that was ignored stays ignored.
    """
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _watch.first)
    _watch.start()
    try:
        yield
    finally:
        _watch.is_over = True


def exit_code() -> int:
    """Of a command that was interrupted, as a shell reports it: 128 and the signal's number."""
    return 128 + (_watch.raised or signal.SIGINT)


def leave_if_interrupted() -> None:
    """End the process now, where a signal has told it to: everything is closed and said.

    What the interpreter and Ray's compiled part would still tidy up can take seconds on a busy machine, and no signal
    is heard any more while they do.
    """
    if _watch.raised is not None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(exit_code())


def told_by() -> str:
    """ "interrupted", or "ended by SIGTERM"."""
    return _told_by(_watch.raised or signal.SIGINT)


def _told_by(number: int) -> str:
    return "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"


class _Watch:
    """Its thread hears each signal at once, also while the main thread is held up somewhere in compiled code."""

    def __init__(self) -> None:
        self.is_over = False
        self.raised: int | None = None
        self._heard, self._woken = socket.socketpair()

    def start(self) -> None:
        self._woken.setblocking(False)
        signal.set_wakeup_fd(self._woken.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._run, name="llmcad-signals", daemon=True).start()

    def first(self, number: int, _frame: FrameType | None) -> None:
        """The handler, in the main thread."""
        if self.is_over or _is_ray_starting():
            end_at_once(number)
        if self.raised is None:
            self.raised = number
            if number == signal.SIGHUP:
                _let_go_of_the_terminal()
            raise Interrupted(signal.Signals(number).name)

    first.ends_a_start = True  # type: ignore[attr-defined]

    def _run(self) -> None:
        number = self._next()
        self._heard.settimeout(START_PATIENCE_S if _is_ray_starting() else PATIENCE_S)
        with suppress(TimeoutError):
            number = self._next()
        end_at_once(number)

    def _next(self) -> int:
        while (number := self._heard.recv(1)[0]) not in SIGNALS:  # another one, if somebody handles it
            pass
        return number


_watch = _Watch()


def end_at_once(number: int) -> None:
    """Kill all processes below this one, remove sessions, exit as a signal's end does. Does not return."""
    with suppress(Exception):
        import psutil

        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                process.kill()
        for session in _sessions():
            session.close()
    if os.isatty(2):
        os.write(2, b"\r\x1b[K\x1b[?25h")  # the cursor may be hidden
    if not _watch.is_over:  # it has been said
        os.write(2, f"llmcad: {_told_by(number)}\n".encode())
    os._exit(128 + number)


def _is_ray_starting() -> bool:
    return any(not session.is_ready for session in _sessions())


def _sessions() -> list[Any]:
    """Of this process. Where none has been made, what makes them need not be loaded."""
    module = sys.modules.get("llmcad_actors.machine.sessions")
    return list(module.SessionFolder.living) if module else []


def _let_go_of_the_terminal() -> None:
    """What is written to a closed one would fail."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        if os.isatty(stream):
            os.dup2(nowhere, stream)
