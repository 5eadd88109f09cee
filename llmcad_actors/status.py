"""The status line: where the pass is, how fast the disk delivers, what memory is in use. Never looks like a hang."""

import sys
import threading
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

from llmcad_actors.core.budget import format_size
from llmcad_actors.engine import Engine
from llmcad_actors.errors import LlmcadError
from llmcad_actors.results import Status

REFRESH_S = 0.25
BUSY_S = 0.05  # of reading, before a rate is worth showing


class StatusLine:
    """One line on the terminal, redrawn from a thread while a request runs; the text goes above it.

    Where standard error is no terminal nothing is drawn, and text goes straight to standard output.
    """

    def __init__(self, console: Console) -> None:
        self._live = Live(Text(), console=console, transient=True, auto_refresh=False)
        self._is_shown = console.is_terminal
        self._text_on_screen = console.is_terminal and sys.stdout.isatty()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._tail = ""  # the text's unfinished last line, drawn with the status below it
        self._guess = ""
        self._status = ""
        self._wrote = False

    def __enter__(self) -> Self:
        if self._is_shown:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        if self._is_shown:
            self._live.stop()

    def say(self, what: str) -> None:
        """What is being waited for."""
        self._status = f"{what} ..."
        self._draw()

    def follow(self, engine: Engine) -> None:
        """Show the engine's status until `end`."""
        if self._is_shown:
            self._stop.clear()
            self._thread = threading.Thread(target=self._follow, args=(engine,), daemon=True)
            self._thread.start()

    def write(self, text: str) -> None:
        """Accepted text."""
        self._guess, self._wrote = "", True
        if not self._text_on_screen:
            sys.stdout.write(text)
            sys.stdout.flush()
            return
        *lines, self._tail = (self._tail + text).split("\n")
        for line in lines:
            self._live.console.print(Text(line), soft_wrap=True)
        self._draw()

    def guess(self, text: str) -> None:
        """Provisional text, shown dim until the next accepted text replaces it."""
        if self._text_on_screen:
            self._guess = text
            self._draw()

    def end(self) -> None:
        """The request is over: stop the thread, leave the text."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(5)
            self._thread = None
        if self._wrote and not self._text_on_screen:
            sys.stdout.write("\n")
            sys.stdout.flush()
        self._wrote = False
        if self._tail:
            tail, self._tail, self._guess = self._tail, "", ""
            self._live.console.print(Text(tail), soft_wrap=True)

    def _draw(self) -> None:
        if self._is_shown:
            text = Text(self._tail)
            text.append(self._guess, style="dim italic")
            if self._tail or self._guess:
                text.append("\n")
            text.append(self._status, style="dim")
            self._live.update(text, refresh=True)

    def _follow(self, engine: Engine) -> None:
        try:
            before, rate = engine.status(), 0.0
            while not self._stop.wait(REFRESH_S):
                now = engine.status()
                if (seconds := now.read_seconds - before.read_seconds) > BUSY_S:
                    rate = (now.bytes_read - before.bytes_read) / seconds
                    before = now
                self._status = describe(now, rate)
                self._draw()
        except LlmcadError:
            return  # the request itself reports what broke


def describe(status: Status, rate: float) -> str:
    """ "24 tokens, 6.8 a pass | layer 7 of 24, 1800 MB/s | 1.31 of 1.50 GB"."""
    where = f"{status.shard} ({status.shard_index + 1} of {status.num_shards}), {rate / 1e6:.0f} MB/s"
    memory = f"{format_size(status.memory_bytes)} of {format_size(status.memory_cap_bytes)}"
    passes = f"{status.new_tokens} tokens, {status.tokens_per_pass:.1f} a pass"
    return " | ".join((passes, where, memory))
