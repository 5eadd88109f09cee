"""Sizes and rates as people write them."""

import re
from decimal import Decimal

from llmcad_actors.core.quoting import quoted
from llmcad_actors.errors import ConfigError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_NUMBER = r"(\d{1,15}(?:\.\d{1,15})?|\.\d{1,15})"
_SIZE = re.compile(_NUMBER + r"\s*([KMGT]I?)?(B)?", re.IGNORECASE)
_MOST = 1 << 62
_PERCENT = re.compile(r"(\d{1,15}(?:\.\d{1,15})?)\s*%")
_SHOWN = 60  # characters of what was given, in a message
_PLAIN_BYTES = 10**6  # a bare number below it is a size whose unit was forgotten


def parse_size(text: str, total: int) -> int:
    """Bytes of memory. K, M, G, T are powers of 1000, Ki to Ti of 1024; the B may be left out; % is of `total`.

    "1.5GB" is 1 500 000 000, "512MiB" 536 870 912, "4G" the same as "4GB", a bare whole number from a million on is
    bytes. Raises ConfigError for anything else, and for nothing at all.
    """
    if percent := _PERCENT.fullmatch(text.strip()):
        share = Decimal(percent[1])
        size = int(total * share / 100) if share <= 100 else 0
    else:
        size = _bytes_of(text, "a memory size")
    if size < 1:
        raise ConfigError(
            f"cannot use {_shown(text)} as a memory size: write for example 4GB, 1.5G, 512MiB, "
            f"or 75% (of the {format_size(total)} that may be used here)"
        )
    return size


def is_share(text: str) -> bool:
    """Whether a size is a share of something: "75%"."""
    return _PERCENT.fullmatch(text.strip()) is not None


def parse_file_size(text: str, what: str) -> int:
    """Bytes, as `parse_size`, but for a share of anything. `what` is named in messages. Raises ConfigError."""
    size = _bytes_of(text, what)
    if size < 1:
        raise ConfigError(f"cannot use {_shown(text)} as {what}: write for example 2.5GB, 800MB or 4GiB")
    return size


def parse_rate(text: str) -> float:
    """Bytes per second: a size with "/s" after it or not. Raises ConfigError."""
    size = _bytes_of(text.strip().removesuffix("/s"), "a rate")
    if size < 1:
        raise ConfigError(f"cannot use {_shown(text)} as a rate: write for example 400MB/s or 1.5GB/s")
    return float(size)


def format_size(num_bytes: int) -> str:
    """Decimal units, as `parse_size` reads them: "1.50 GB", "512.0 MB", "12 B"."""
    if num_bytes >= 10**9:
        return f"{num_bytes / 10**9:.2f} GB"
    if num_bytes >= 10**6:
        return f"{num_bytes / 10**6:.1f} MB"
    if num_bytes >= 10**3:
        return f"{num_bytes / 10**3:.1f} KB"
    return f"{num_bytes} B"


def _bytes_of(text: str, what: str) -> int:
    """0 for what is no size. Raises ConfigError for a number that is one but for its unit."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        return 0
    number, unit, letter = Decimal(match[1]), (match[2] or "").upper(), match[3]
    if number and not unit and not letter and (number < _PLAIN_BYTES or number % 1):
        raise ConfigError(
            f"cannot use {_shown(text)} as {what}: the unit is missing; write {match[1]}GB, {match[1]}MB "
            f"or, if it is bytes, {match[1]}B"
        )
    size = int(number * _UNITS[unit])
    return size if size <= _MOST else 0


def _shown(text: str) -> str:
    return quoted(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")
