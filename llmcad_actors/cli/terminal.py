"""The user's terminal: text on standard output, and around it, on standard error, a status line and a guess.

    accepted text of the model, the last line of it unfi|nished, guessed       <- the cursor stays at |
    5.3 tokens/s | 12 s | 4.2 tokens a pass | 1800 MB/s | 1.31 of 1.50 GB

The text goes to standard output as it is, and is never written again or broken into lines. All that steers the
terminal goes to standard error, and only if that is a terminal. If the text appears on the same one, the status stands
on the line below it, or on the text's own line while that is empty; both are erased before more text is written.

The catch is the last column: once it is filled, terminals wait with the wrap for the next character, and forget it
when the cursor is moved. So the character that filled it is written once more; where it is not certain that the
column is filled, or which character did it, nothing is drawn until more text has come.
"""

import fcntl
import os
import struct
import sys
import threading
from typing import TextIO

from llmcad_actors.cli import output
from llmcad_actors.cli.columns import BAR, TAB, Column, fit, fit_parts, visible, widths

LEAST_WIDTH, LEAST_HEIGHT = 10, 2
USUAL_SIZE = (80, 24)  # of a terminal that does not tell
ESC = "\x1b"
MAKE_ROOM = f"{ESC}D{ESC}[A"  # down, scrolling at the bottom, and up again: there is a line below
SAVE, RESTORE = f"{ESC}7", f"{ESC}8"
DOWN = f"{ESC}[B\r"
ERASE_LINE, ERASE_BELOW = f"{ESC}[K", f"{ESC}[J"  # from the cursor on; also what is below
DIM, GUESSED, STRONG, YELLOW = f"{ESC}[2m", f"{ESC}[2;3m", f"{ESC}[1m", f"{ESC}[33m"
PLAIN = f"{ESC}[0m"
REAL_DEVICE = 0x80045432  # TIOCGDEV: /dev/tty has a number of its own


class Terminal:
    """Both streams. Its methods may be called by several threads; nothing of the drawing ever raises."""

    def __init__(self, *, draws: bool = True) -> None:
        """`draws`: False leaves only the text."""
        self._draws = draws and is_terminal(sys.stderr) and os.environ.get("TERM", "dumb") != "dumb"
        self._has_styles = not os.environ.get("NO_COLOR")
        self._is_shown = is_terminal(sys.stdout)
        self._is_here = self._is_shown and is_terminal(sys.stderr) and device(sys.stdout) == device(sys.stderr)
        self._lock = threading.RLock()
        self._column = Column(size_of(sys.stderr)[0])
        self._status, self._guess = "", ""
        self._warnings: list[str] = []  # not told yet
        self._is_drawn = self._is_below = False
        self._is_line_open = False  # of standard output

    @property
    def draws(self) -> bool:
        """Whether there is a terminal to draw on."""
        return self._draws

    @property
    def shows_guesses(self) -> bool:
        """Whether a guess can be told from the text: without styles, or on another terminal, it cannot."""
        return self._draws and self._is_here and self._has_styles

    def write(self, text: str) -> None:
        """Accepted text. Raises as `output.write` does."""
        with self._lock:
            self._guess = ""
            self._erase()
            shown = visible(text) if self._is_shown else text
            output.write(shown)
            self._is_line_open = not shown.endswith("\n") if shown else self._is_line_open
            self._follow(shown)
            self._tell()
            self._draw()

    def lead(self, text: str) -> None:
        """What the text goes on from, on standard error, right before it; on a line of its own if that is elsewhere."""
        with self._lock:
            self._erase()
            shown = visible(text) if is_terminal(sys.stderr) else text
            self._put(self._styled(STRONG, shown))
            self._follow(shown)
            if not self._is_here and not shown.endswith("\n"):
                self._put("\n")

    def guess(self, text: str) -> None:
        """What may come next: shown until more text is written, as far as the line has room."""
        with self._lock:
            self._guess = text if self.shows_guesses else ""
            self._draw()

    def say(self, status: str) -> None:
        """Show this in the status line; "" takes it away."""
        with self._lock:
            self._status = " ".join(status.split())
            self._draw()

    def warn(self, text: str) -> None:
        """A line on standard error that stays: at once, or in the status line until the text's own line has ended."""
        with self._lock:
            self._warnings.append(" ".join(text.split()))
            self._tell()
            self._draw()

    def end(self) -> None:
        """Leave the text, its last line ended, and warnings, and nothing else. More may follow."""
        with self._lock:
            self._status = self._guess = ""
            self._erase()
            if self._is_line_open:
                self.write("\n")
            elif not self._column.is_line_start:
                self._put("\n")
                self._follow("\n")
                self._tell()

    def _tell(self) -> None:
        if self._warnings and self._column.is_line_start:
            self._erase()
            self._put("".join(f"{self._styled(YELLOW, visible(text))}\n" for text in self._warnings))
            self._warnings.clear()

    def _follow(self, shown: str) -> None:
        if self._is_here:
            self._column = self._column.after(shown)

    def _draw(self) -> None:
        if not self._draws:
            return
        width, height = size_of(sys.stderr)
        if width != self._column.width:
            self._column = self._column.resized(width)
            self._erase()
        line = BAR.join(part for part in (*self._warnings, self._status) if part)
        if not (line or self._guess) or width < LEAST_WIDTH or height < LEAST_HEIGHT:
            return self._erase()
        guess, status = self._fitting_guess(), self._styled(DIM, fit_parts(visible(line), width - 1))
        if self._column.is_line_start and not guess:
            if self._is_below:
                self._erase()
            self._put(f"\r{status}{ERASE_LINE}\r")
        elif self._column.may_wrap and not self._column.filler:
            return
        else:
            self._put(self._around(self._styled(GUESSED, guess), status))
            self._is_below = True
        self._is_drawn = True

    def _erase(self) -> None:
        if self._is_drawn:
            self._put(self._around("", "", make_room=MAKE_ROOM if self._is_below else ""))
        self._is_drawn = self._is_below = False

    def _around(self, guess: str, below: str, *, make_room: str = MAKE_ROOM) -> str:
        """Draw behind the text and on the line below, and come back.

        What is below is erased from there: some terminals keep what a program erases from the very first place on.
        """
        filler = self._column.filler
        behind = "" if self._column.may_wrap else guess + ERASE_LINE
        back = f"{ESC}[{self._column.width + 1 - max(widths(filler))}G{filler}" if filler else ""
        return f"{make_room}{SAVE}{behind}{DOWN}{below}{ERASE_BELOW}{RESTORE}{back}"

    def _fitting_guess(self) -> str:
        line = visible(self._guess.partition("\n")[0])
        at = " " * (max(self._column.places) % TAB)
        return fit((at + line).expandtabs(TAB)[len(at) :], self._column.room)

    def _styled(self, style: str, text: str) -> str:
        return f"{style}{text}{PLAIN}" if text and self._has_styles and self._draws else text

    def _put(self, text: str) -> None:
        """To standard error; a terminal that has gone is not drawn on any more."""
        try:
            sys.stderr.write(text)
            sys.stderr.flush()
        except (OSError, ValueError, AttributeError):
            self._draws = self._is_here = self._is_drawn = False


def is_terminal(stream: TextIO | None) -> bool:
    """False too for a stream that is closed, or no file."""
    try:
        return stream is not None and os.isatty(stream.fileno())
    except (OSError, ValueError):
        return False


def device(stream: TextIO) -> int:
    """The number of the terminal that a stream leads to, whatever name it was opened by."""
    try:
        number: int = struct.unpack("I", fcntl.ioctl(stream.fileno(), REAL_DEVICE, bytes(4)))[0]
        return number
    except OSError:
        return os.fstat(stream.fileno()).st_rdev


def size_of(stream: TextIO | None) -> tuple[int, int]:
    """Columns and lines of a terminal, as they are now; usual ones of what is none."""
    try:
        width, height = os.get_terminal_size(stream.fileno()) if stream else USUAL_SIZE
    except (OSError, ValueError):
        return USUAL_SIZE
    return (width or USUAL_SIZE[0], height or USUAL_SIZE[1])
