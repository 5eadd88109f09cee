"""In which column of a terminal a text has left the cursor. Knows characters and widths, and no escape code.

Terminals agree on letters and on East Asian characters, and disagree on how wide a joined emoji or a flag is. So a
`Column` holds every place that the cursor may be in; with two or more of them, what would harm the text in any is
left undone.
"""

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Self

TAB = 8
BAR = " | "  # between the parts of a line that has several
JOINER, VIRAMA = "\u200d", 9  # a character; a class of them
TEXT_STYLE, EMOJI_STYLE = "\ufe0e", "\ufe0f"  # variation selectors
_HIDDEN = {code: chr(0x2400 + code) for code in range(0x20)} | {0x7F: "\u2421"}
_HIDDEN |= dict.fromkeys(range(0x80, 0xA0), "\ufffd")
_SHOWN = str.maketrans({chr(code): sign for code, sign in _HIDDEN.items()} | {"\n": "\n", "\t": "\t", "\r": ""})


def visible(text: str) -> str:
    """The text without what would steer a terminal: control characters become signs for them, but for `\\n`, `\\t`."""
    return text.translate(_SHOWN)


@lru_cache(4096)
def widths(char: str) -> tuple[int, ...]:
    """How many columns a character may take, on one terminal or another."""
    if " " <= char <= "~":
        return (1,)
    if char in (TEXT_STYLE, EMOJI_STYLE):
        return (-1, 0) if char == TEXT_STYLE else (0, 1)
    if "\U0001f1e6" <= char <= "\U0001f1ff" or "\U0001f3fb" <= char <= "\U0001f3ff":  # halves of flags; skin tones
        return (0, 1, 2)
    return _widths_of_kind(char)


def _widths_of_kind(char: str) -> tuple[int, ...]:
    kind = unicodedata.category(char)
    if kind in ("Mn", "Me"):
        return (0,)
    if kind in ("Cf", "Mc", "Zl", "Zp") or "\u1160" <= char <= "\u11ff" or "\ud7b0" <= char <= "\ud7fb":
        return (0, 1)
    if kind in ("Cn", "Co", "Cs"):
        return (0, 1, 2)
    return (2,) if unicodedata.east_asian_width(char) in "WF" else (1,)


def fit(text: str, room: int) -> str:
    """The beginning of one line of text that takes `room` columns at most, on any terminal."""
    for at, char in enumerate(text):
        room -= max(widths(char))
        if room < 0:
            return text[:at]
    return text


def _joins(char: str) -> bool:
    """Whether what follows may become one sign with what is before: an emoji's joiner, a virama."""
    return char == JOINER or (char > "~" and unicodedata.combining(char) == VIRAMA)


def fit_parts(text: str, room: int) -> str:
    """`fit`, but parts between bars are left out as wholes, from the end."""
    while (shorter := text.rpartition(BAR)[0]) and fit(text, room) != text:
        text = shorter
    return fit(text, room)


@dataclass(frozen=True, slots=True)
class Column:
    """Where the cursor may be. The place `width` is the last column, just filled: the next character wraps."""

    width: int
    places: frozenset[int] = frozenset({0})
    line: str = ""  # the text's unfinished last line

    @property
    def is_line_start(self) -> bool:
        return self.places == {0}

    @property
    def may_wrap(self) -> bool:
        """Whether the next character may wrap, a state that moving the cursor would end."""
        return self.width in self.places

    @property
    def filler(self) -> str:
        """The character that certainly fills the line's last column; "" if none does."""
        last = self.line[-1:]
        return last if self.places == {self.width} and widths(last)[0] > 0 else ""

    @property
    def is_lost(self) -> bool:
        """Whether the cursor may be anywhere, on a character of the text too."""
        return len(self.places) > self.width

    @property
    def room(self) -> int:
        """Columns that are free on the line, the last one left out; 0 if that is not certain."""
        return max(0, self.width - 1 - max(self.places)) if len(self.places) == 1 else 0

    def after(self, text: str) -> Self:
        """Once this text, with no control characters but newline and tab, has been written."""
        *ended, rest = text.split("\n")
        line, places = ("", frozenset({0})) if ended else (self.line, self.places)
        before = line[-1:]
        for char in rest:
            places = self._tabbed(places) if char == "\t" else self._moved(places, char, before)
            before = char
        return replace(self, places=places, line=line + rest)

    def resized(self, width: int) -> Self:
        """On a terminal of another width: some set the line anew, others only cut what is beyond their edge."""
        if width == self.width:
            return self
        if self.may_wrap or max(self.places) >= width:  # the cursor may stand on text now
            return replace(self, width=width, places=frozenset(range(width + 1)))
        return replace(self, width=width, places=self.places | type(self)(width).after(self.line).places)

    def _moved(self, places: frozenset[int], char: str, before: str) -> frozenset[int]:
        steps = (0, *widths(char)) if _joins(before) else widths(char)
        if len(steps) == 1:
            return frozenset(end for place in places for end in self._ends(place, steps[0]))
        if max(places) + max(steps) >= self.width:
            return frozenset(range(self.width + 1))
        return frozenset(max(0, place + step) for place in places for step in steps)

    def _ends(self, place: int, step: int) -> Iterable[int]:
        if place + step <= self.width:
            return (place + step,)
        return (step,) if place == self.width else (step, self.width)  # a wide character on the last column

    def _tabbed(self, places: frozenset[int]) -> frozenset[int]:
        ends = {min(place - place % TAB + TAB, self.width - 1) for place in places}
        return frozenset(ends | ({self.width, min(TAB, self.width - 1)} if self.width in places else set()))
