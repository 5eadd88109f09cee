"""What others wrote, as a message may show it: one line, at most 200 characters, whatever it is."""

import reprlib
from typing import Any

MOST_CHARACTERS = 200
_GAP = " ... "
_AFTER = 60
_BEFORE = MOST_CHARACTERS - _AFTER - len(_GAP)
_MOST_BITS = 512  # of a number whose digits are worth reading


class _Short(reprlib.Repr):
    """`repr` whose work is bounded too: of numbers with a million digits, and of lists that hold themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 4
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = 12
        self.maxstring = self.maxother = MOST_CHARACTERS

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() <= _MOST_BITS else f"a number of {x.bit_length():,} bits"


def quoted(value: Any) -> str:
    """`repr(value)`, shortened."""
    return _cut(_Short().repr(value))


def shown(text: object) -> str:
    """Text without quotes around it, such as a name or another library's message; what is no print is escaped."""
    text = _cut(str(text))
    return _cut("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text))


def _cut(text: str) -> str:
    """Beginning and end: of a path, both tell something."""
    return text if len(text) <= MOST_CHARACTERS else f"{text[:_BEFORE]}{_GAP}{text[-_AFTER:]}"
