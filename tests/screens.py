"""Real pseudo-terminals, and an emulator that shows what a user would see on them."""

import fcntl
import os
import select
import struct
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self, TextIO

import pyte
from pyte.modes import DECAWM
from pyte.screens import wcwidth


class Screen(pyte.HistoryScreen):
    """What stands on a terminal, and what has scrolled away."""

    def __init__(self, width: int, height: int) -> None:
        super().__init__(width, height, history=100_000)

    def draw(self, data: str) -> None:
        """One character at a time: behind one without width the emulator would drop the rest, and before it wrap."""
        modes = self.mode
        for char in data:
            self.mode = modes if wcwidth(char) else modes - {DECAWM}
            super().draw(char)
        self.mode = modes

    def resize(self, lines: int | None = None, columns: int | None = None) -> None:
        """What is beyond the edge is cut, of lines that are gone too; the cursor comes back to it; tabs go on."""
        if columns == self.columns and lines in (None, self.lines):
            return
        for line in self.history.top:
            for x in range(columns or self.columns, self.columns):
                line.pop(x, None)
        super().resize(lines, columns)
        self._stand_on_last_column()
        self.tabstops = set(range(8, self.columns, 8))

    def erase_in_display(self, how: int = 0, *args: object, **kwargs: object) -> None:
        """A cursor that waits behind the last column stands on it, and what it stands on is erased, as in xterm."""
        self._stand_on_last_column()
        super().erase_in_display(how)

    def erase_in_line(self, how: int = 0, private: bool = False) -> None:
        self._stand_on_last_column()
        super().erase_in_line(how, private)

    def index(self) -> None:
        """Moving forgets that a wrap is due, as in xterm; a wrap of the text itself has returned the cursor before."""
        self._stand_on_last_column()
        super().index()

    def _stand_on_last_column(self) -> None:
        self.cursor.x = min(self.cursor.x, self.columns - 1)

    def rows(self) -> list[str]:
        """All lines, oldest first, without the blanks at their ends."""
        columns, buffer = range(self.columns), self.buffer
        lines = [*self.history.top, *(buffer[y] for y in range(self.lines))]
        return ["".join(line[x].data for x in columns).rstrip() for line in lines]

    def text(self) -> str:
        return "\n".join(self.rows()).rstrip("\n")

    def until_cursor(self) -> tuple[list[str], int]:
        """The lines down to the cursor, its own cut there; and its column."""
        row = len(self.history.top) + self.cursor.y
        own = self.buffer[self.cursor.y]
        last = "".join(own[x].data for x in range(min(self.cursor.x, self.columns)))
        return [*self.rows()[:row], last.rstrip()], self.cursor.x

    @property
    def below(self) -> str:
        """The line below the cursor's."""
        return self.display[self.cursor.y + 1].rstrip() if self.cursor.y + 1 < self.lines else ""


class Pty:
    """A pseudo-terminal with an emulator at its other end."""

    def __init__(self, width: int = 80, height: int = 24) -> None:
        self._master, self.slave = os.openpty()
        self.screen = Screen(width, height)
        self._feed = pyte.ByteStream(self.screen)
        self.received = b""
        self._stream: TextIO | None = None
        self._tell_size(width, height)
        os.set_blocking(self._master, False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._stream is not None:
            self._stream.close()
        else:
            os.close(self.slave)
        os.close(self._master)

    @property
    def stream(self) -> TextIO:
        """The terminal as a program has it."""
        if self._stream is None:
            self._stream = os.fdopen(self.slave, "w", encoding="utf-8")
        return self._stream

    def resize(self, width: int) -> None:
        self.take()
        self.screen.resize(columns=width)
        self._tell_size(width, self.screen.lines)

    @contextmanager
    def attended(self) -> Iterator[None]:
        """Inside, what is written is taken all the while: a terminal that nobody looks at is full after 4 KB."""
        stop = threading.Event()

        def attend() -> None:
            while not stop.is_set():
                self.take(0.02)

        thread = threading.Thread(target=attend)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            self.take()

    def take(self, wait_s: float = 0.0) -> bool:
        """Show what has been written; whether the other side is still open."""
        while select.select([self._master], [], [], wait_s)[0]:
            try:
                data = os.read(self._master, 65536)
            except OSError:  # closed at the other side
                return False
            self.received += data
            self._feed.feed(data)
            wait_s = 0.0
        return True

    def _tell_size(self, width: int, height: int) -> None:
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
