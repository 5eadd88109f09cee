"""Checks of single values that a caller gives: each returns the value in the type we go on with, or says what is wrong.

numpy's numbers and booleans count as Python's, which they become. Nothing is converted that could be a mistake: no
number is cut to a whole one, no text is read as a number, no boolean passes for 0 or 1.
"""

import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from numbers import Integral, Real
from typing import TypeGuard

from llmcad_actors.core.quoting import quoted
from llmcad_actors.errors import ConfigError


def whole_number(name: str, value: object, least: int, most: int) -> int:
    """Raises `ConfigError` unless `value` is an integer of [least, most]."""
    if not is_whole(value) or int(value) < least:
        raise ConfigError(f"{name}: {quoted(value)} must be a whole number of at least {least}")
    if int(value) > most:
        raise ConfigError(f"{name}: {quoted(value)} is too large; {most} is the most")
    return int(value)


def is_whole(value: object) -> TypeGuard[Integral]:
    """An integer of any kind; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def share(name: str, value: object) -> float:
    """Raises `ConfigError` unless `value` is a number between 0 and 1, both excluded."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ConfigError(f"{name}: {quoted(value)} must be a number")
    number = math.inf
    with suppress(OverflowError):  # a whole number too large for it
        number = float(value)
    if not 0 < number < 1:
        raise ConfigError(f"{name}: {quoted(value)} must lie between 0 and 1")
    return number


def number(name: str, value: object, least: float, most: float) -> float:
    """Raises `ConfigError` unless `value` is a number of [least, most]."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ConfigError(f"{name}: {quoted(value)} must be a number")
    found = math.inf
    with suppress(OverflowError):
        found = float(value)
    if not least <= found <= most:
        raise ConfigError(f"{name}: {quoted(value)} must lie between {least:g} and {most:g}")
    return found


def biases(name: str, value: object) -> tuple[tuple[int, float], ...]:
    """A mapping from token ids to numbers between -100 and 100. Raises `ConfigError` for anything else."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name}: {quoted(value)} must be a mapping from token ids to numbers")
    return tuple(
        (whole_number(f"{name}: the token id", token, 0, 2**31), number(f"{name} of token {token}", bias, -100, 100))
        for token, bias in value.items()
    )


def flag(name: str, value: object) -> bool:
    """Raises `ConfigError` unless `value` is true or false."""
    numpy = sys.modules.get("numpy")  # not imported for this: without it nothing is of it
    if not isinstance(value, bool) and not (numpy is not None and isinstance(value, numpy.bool_)):
        raise ConfigError(f"{name}: {quoted(value)} must be true or false")
    return bool(value)


def text(name: str, value: object, words: str = "text") -> str:
    """Raises `ConfigError` unless `value` is text that can be written down: `words` says which.

    Half a surrogate pair, which is what Python makes of bytes that are no UTF-8, cannot.
    """
    if not isinstance(value, str):
        raise ConfigError(f"{name}: {quoted(value)} must be {words}")
    check_text(value, name)
    return str.__str__(value)  # not a subclass's own


def check_text(text: str, name: str) -> None:
    """Raises `ConfigError` for what is not text: bytes of another encoding, which Python passes on as surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code, before = ord(text[error.start]), text[: error.start]
        if 0xDC80 <= code <= 0xDCFF:
            raise not_utf8(name, len(os.fsencode(before)), code - 0xDC00) from None
        raise ConfigError(f"{name} is not text: U+{code:04X} at character {error.start} is half of a pair") from None


def not_utf8(name: str, offset: int, byte: int) -> ConfigError:
    help_ = "; convert it first, for example with iconv -f LATIN1 -t UTF-8" if "prompt" in name else ""
    return ConfigError(f"{name} is not UTF-8: byte 0x{byte:02x} at offset {offset} cannot be read{help_}")


def path(name: str, value: object, words: str) -> str:
    """Raises `ConfigError` unless `value` is text or a `pathlib.Path`."""
    given = os.fspath(value) if isinstance(value, os.PathLike) else value
    found = text(name, given, words)
    if "\0" in found:
        raise ConfigError(f"{name}: {quoted(value)} cannot be a path: it holds a zero byte")
    return found


def one_of(name: str, value: object, known: Sequence[str]) -> str:
    """Raises `ConfigError` unless `value` is one of the words `known`."""
    if not isinstance(value, str) or value not in known:
        raise ConfigError(f"{name}: {quoted(value)} is not known; choose one of {', '.join(known)}")
    return str.__str__(value)


def counts(name: str, value: object, most: int) -> tuple[int, ...]:
    """Raises `ConfigError` unless `value` is a list or tuple of one or more numbers from 1 to `most`."""
    if not isinstance(value, tuple | list):
        raise ConfigError(f"{name}: {quoted(value)} must be a list of numbers")
    if not value or not all(is_whole(item) and 1 <= int(item) <= most for item in value):
        raise ConfigError(f"{name}: {quoted(value)} must be one or more numbers above 0, such as 1,1,3,1")
    return tuple(int(item) for item in value)


def stop_strings(name: str, value: object) -> tuple[str, ...]:
    """A text is one stop string; a list or tuple holds several. Raises `ConfigError` for anything else.

    An empty one is refused: every text would end before it began.
    """
    if not isinstance(value, str | list | tuple):
        raise ConfigError(f"{name}: {quoted(value)} must be a text, or a list of texts")
    stops = tuple(text(name, stop) for stop in ([value] if isinstance(value, str) else value))
    if "" in stops:
        raise ConfigError(f"{name}: an empty text cannot be waited for; leave it out")
    return stops


def function(name: str, value: object) -> None:
    """Raises `ConfigError` unless `value` can be called."""
    if not callable(value):
        raise ConfigError(f"{name}: {quoted(value)} must be a function")


def known_names(what: str, names: Iterable[str], known: Sequence[str]) -> None:
    """Raises `ConfigError` for the first of `names` that is not known, with those that are."""
    for name in names:
        if name not in known:
            raise ConfigError(f"unknown {what} {quoted(name)}; known: {', '.join(sorted(known))}")
