"""Stored number formats in numpy, which has no bf16: a stored tensor is an array of `STORAGE[dtype]`."""

from typing import Any

import numpy as np
import numpy.typing as npt

from llmcad_actors.errors import CheckpointError

Stored = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]

STORAGE: dict[str, type[np.generic]] = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}
TORCH_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}  # as config.json says it


def decode(stored: Stored, dtype: str) -> Floats:
    """float32 values of a stored tensor; exact."""
    if dtype == "BF16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32)


def encode(values: Floats, dtype: str) -> Stored:
    """Round to nearest even. Raises CheckpointError where F16 cannot hold a value."""
    if dtype == "BF16":
        return _bf16(values)
    with np.errstate(over="ignore"):
        stored = values.astype(STORAGE[dtype])
    if not np.array_equal(np.isfinite(stored), np.isfinite(values)):
        raise CheckpointError(f"{dtype} cannot hold the value {np.abs(values).max():g}; use BF16 or F32 instead.")
    return stored


def convert(stored: Stored, dtype: str, to: str) -> Stored:
    """The same values in another format; the bits themselves when it is the same one."""
    return stored if dtype == to else encode(decode(stored, dtype), to)


def _bf16(values: Floats) -> Stored:
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    # Rounding up a NaN's payload could carry into the sign: keep its top bits, and keep it a NaN.
    return np.where(np.isnan(values), (bits >> 16).astype(np.uint16) | 0x40, rounded)


# Keep sign, mantissa and the exponent's lowest bit of random bits, and set the rest of the exponent: magnitudes
# in [1/128, 1/32), standard deviation 0.019, as fast as the bits themselves.
_NOISE = {
    "BF16": (np.uint16, 0x80FF, 0x3C00),
    "F16": (np.uint16, 0x87FF, 0x2000),
    "F32": (np.uint32, 0x80FFFFFF, 0x3C000000),
}


class Noise:
    """A reproducible stream of small, finite, nonzero weights that do not compress."""

    def __init__(self, *seed: int) -> None:
        self._bits = np.random.SFC64(np.random.SeedSequence(seed))

    def take(self, shape: tuple[int, ...], dtype: str) -> Stored:
        """The next values, stored as `dtype`."""
        kind, mask, exponent = _NOISE[dtype]
        count = int(np.prod(shape))
        words = -(-count * np.dtype(kind).itemsize // 8)
        bits = np.asarray(self._bits.random_raw(words)).view(kind)[:count]
        bits &= kind(mask)
        bits |= kind(exponent)
        return bits.view(STORAGE[dtype]).reshape(shape)
