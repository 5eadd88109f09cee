"""The status line: how fast tokens come and the disk delivers, what memory is in use. Never looks like a hang."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, Self

from llmcad_actors.cli.columns import BAR
from llmcad_actors.cli.terminal import Terminal
from llmcad_actors.core.budget import format_size
from llmcad_actors.core.stats import Stats
from llmcad_actors.results import Status

REFRESH_S = 0.25
BUSY_S = 0.05  # of reading, before a rate is worth showing
JOIN_S = 1.0


class Watched(Protocol):
    """What a status line follows: an engine."""

    def status(self) -> Status: ...


class StatusLine:
    """One line on the terminal, redrawn from a thread while a request runs; what is written goes above it.

    Where standard error is no terminal nothing is drawn, and text goes straight to standard output.
    """

    def __init__(self, *, draws: bool = True, clock: Callable[[], float] = time.monotonic) -> None:
        """`draws`: False leaves only the text."""
        self._terminal = Terminal(draws=draws)
        self._clock = clock

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    @property
    def shows_guesses(self) -> bool:
        return self._terminal.shows_guesses

    def say(self, what: str) -> None:
        """What is being waited for."""
        self._terminal.say(f"{what} ...")

    def lead(self, text: str) -> None:
        """What the text goes on from, on standard error."""
        self._terminal.lead(text)

    def write(self, text: str) -> None:
        """Accepted text. Raises as `output.write` does."""
        self._terminal.write(text)

    def guess(self, text: str) -> None:
        """Provisional text, shown until the next accepted text replaces it."""
        self._terminal.guess(text)

    def warn(self, text: str) -> None:
        """Say on standard error, from any thread, what the user should know now. No line of the text is broken."""
        self._terminal.warn(f"llmcad: {text}")

    def end(self) -> None:
        """Leave the text, its last line ended, and nothing else."""
        self._terminal.end()

    @contextmanager
    def following(self, engine: Watched, what: str = "") -> Iterator[None]:
        """Inside, show the engine's status, behind `what` it does. No thread of ours asks the engine afterwards."""
        if not self._terminal.draws:
            yield
            return
        stop = threading.Event()
        thread = threading.Thread(target=self._follow, args=(engine, what, stop), name="llmcad-status", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(JOIN_S)  # one that still waits for an answer asks no more once it has come
            self._terminal.say("")

    def _follow(self, engine: Watched, what: str, stop: threading.Event) -> None:
        began, rate = self._clock(), ReadRate()
        try:
            while not stop.is_set():
                status = engine.status()
                line = describe(status, self._clock() - began, rate.after(status))
                if not stop.is_set():
                    self._terminal.say(f"{what}: {line}" if what else line)
                stop.wait(REFRESH_S)
        except Exception:  # a thread's outermost method: the request itself reports what broke
            return


class ReadRate:
    """Bytes per second of reading, measured over stretches long enough to tell."""

    def __init__(self) -> None:
        self._before: Status | None = None
        self._rate = 0.0

    def after(self, now: Status) -> float:
        """The latest rate; 0.0 until one has been measured."""
        before = self._before or now
        if (seconds := now.read_seconds - before.read_seconds) > BUSY_S:
            self._rate = (now.bytes_read - before.bytes_read) / seconds
            before = now
        self._before = before
        return self._rate


def describe(status: Status, elapsed_s: float, rate: float) -> str:
    """ "5.3 tokens/s | 12 s | 4.2 tokens a pass | 1800 MB/s | 1.31 of 1.50 GB | layer.7 (8 of 24)"."""
    tokens = (f"{speed(status.new_tokens, status.seconds)} tokens/s", f"{status.tokens_per_pass:.1f} tokens a pass")
    first, second = tokens if status.new_tokens else ("first pass", "")
    memory = f"{format_size(status.memory_bytes)} of {format_size(status.memory_cap_bytes)}"
    parts = (first, format_seconds(elapsed_s), second, _reading(status, rate), memory, _place(status))
    return BAR.join(part for part in parts if part)


def summary(stats: Stats) -> str:
    """ "96 tokens in 19 s: 5.1 tokens/s | 4.2 tokens a pass | 52.21 GB read, 2750 MB/s | peak memory ..."."""
    tokens = "1 token" if stats.new_tokens == 1 else f"{stats.new_tokens} tokens"
    rate = f", {stats.bytes_read / stats.read_seconds / 1e6:.0f} MB/s" if stats.read_seconds else ""
    return BAR.join(
        (
            f"{tokens} in {format_seconds(stats.seconds)}: {speed(stats.new_tokens, stats.seconds)} tokens/s",
            f"{stats.tokens_per_pass:.1f} tokens a pass",
            f"{format_size(stats.bytes_read)} read{rate}" if stats.bytes_read else "nothing read from disk",
            f"peak memory {format_size(stats.peak_memory_bytes)} of {format_size(stats.memory_cap_bytes)}",
        )
    )


def speed(tokens: int, seconds: float) -> str:
    """ "5.3", "0.071": two digits that count."""
    rate = tokens / seconds if seconds else 0.0
    return f"{rate:.0f}" if rate >= 10 else f"{rate:.1f}" if rate >= 1 else f"{rate:.2g}"


def format_seconds(seconds: float) -> str:
    """ "12 s", "2:05 min", "1:02:05 h"."""
    minutes, left = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{left:02} h"
    return f"{minutes}:{left:02} min" if minutes else f"{left} s"


def _reading(status: Status, rate: float) -> str:
    if not status.num_shards:
        return "all weights in memory"
    return f"{rate / 1e6:.0f} MB/s" if rate else ""


def _place(status: Status) -> str:
    return f"{status.shard} ({status.shard_index + 1} of {status.num_shards})" if status.num_shards else ""
