"""Sizes and rates as people write them."""

import re
from decimal import Decimal

from llmcad_actors.errors import ConfigError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*([KMGT]I?)?B?", re.IGNORECASE)
_PERCENT = re.compile(r"(\d+(?:\.\d+)?)\s*%")


def parse_size(text: str, total: int) -> int:
    """Bytes. K, M, G, T are powers of 1000, Ki to Ti of 1024; the B may be left out; % is of `total`.

    "1.5GB" is 1 500 000 000, "512MiB" 536 870 912, "4G" the same as "4GB", a bare number is bytes. Raises
    ConfigError for anything else, and for nothing at all.
    """
    trimmed = text.strip()
    if percent := _PERCENT.fullmatch(trimmed):
        share = Decimal(percent[1])
        size = int(total * share / 100) if share <= 100 else 0
    else:
        size = _bytes_of(trimmed)
    if size < 1:
        raise ConfigError(
            f"cannot use {text!r} as a memory size: write for example 4GB, 1.5G, 512MiB, "
            f"or 75% (of the {format_size(total)} that may be used here)"
        )
    return size


def parse_rate(text: str) -> float:
    """Bytes per second: a size with "/s" after it or not. Raises ConfigError."""
    size = _bytes_of(text.strip().removesuffix("/s"))
    if size < 1:
        raise ConfigError(f"cannot use {text!r} as a rate: write for example 400MB/s or 1.5GB/s")
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


def _bytes_of(text: str) -> int:
    match = _SIZE.fullmatch(text)
    return int(Decimal(match[1]) * _UNITS[(match[2] or "").upper()]) if match else 0
