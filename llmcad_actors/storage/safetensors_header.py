"""Read one safetensors file's header: which tensor lies where. Knows nothing of models.

    file := header length (8 bytes, little endian) | header (JSON) | data

The header maps each name to dtype, shape and [begin, end) within the data. Only the header is read; the
file's size is compared with what it declares, so a truncated download is found before anything starts.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmcad_actors.errors import CheckpointError

# Bytes per element of the dtypes safetensors stores in whole bytes; which are usable is decided elsewhere.
ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("BF16", "F16", "I16", "U16"), 2),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
}
MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor's bytes lie: row-major, little endian."""

    name: str
    dtype: str  # safetensors' names: "BF16", "F16", "F32"
    shape: tuple[int, ...]
    file: Path
    offset: int  # absolute byte offset in the file
    nbytes: int

    def rows(self, start: int, stop: int) -> "TensorInfo":
        """The byte range of rows [start, stop) of the first axis, under the same name."""
        row_bytes = self.nbytes // self.shape[0]
        return TensorInfo(
            name=self.name,
            dtype=self.dtype,
            shape=(stop - start, *self.shape[1:]),
            file=self.file,
            offset=self.offset + start * row_bytes,
            nbytes=(stop - start) * row_bytes,
        )


def read_header(file: Path) -> dict[str, TensorInfo]:
    """All tensors of `file`. Raises CheckpointError when it is absent, truncated or not safetensors."""
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            _check_length(file, size, length)
            header = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}.") from error
    entries = _parse(file, header)
    infos = {name: _tensor(file, name, entry, 8 + length) for name, entry in entries.items()}
    _check_size(file, size, max((i.offset + i.nbytes for i in infos.values()), default=8 + length))
    return infos


def _check_length(file: Path, size: int, length: int) -> None:
    if size < 8 or (length <= MAX_HEADER_BYTES and size < 8 + length):
        raise CheckpointError(f"{file} is truncated: its {size:,} bytes do not hold its header; fetch it again.")
    if length > MAX_HEADER_BYTES:
        raise _corrupt(file, f"it declares a header of {length:,} bytes (limit {MAX_HEADER_BYTES:,})")


def _check_size(file: Path, size: int, declared: int) -> None:
    if size != declared:
        word = "truncated" if size < declared else "longer than declared"
        raise CheckpointError(
            f"{file} is {word}: {size:,} bytes on disk, its header declares {declared:,}; fetch it again."
        )


def _parse(file: Path, header: bytes) -> Mapping[str, Any]:
    try:
        entries = json.loads(header)
    except ValueError as error:
        raise _corrupt(file, f"the header is not JSON ({error})") from error
    if not isinstance(entries, dict):
        raise _corrupt(file, "the header is not a JSON object")
    entries.pop("__metadata__", None)
    return entries


def _tensor(file: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    try:
        dtype, shape = str(entry["dtype"]), tuple(int(n) for n in entry["shape"])
        begin, end = (int(n) for n in entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise _corrupt(file, f"the entry of {name} is malformed ({entry!r})") from error
    expected = math.prod(shape) * ITEM_BYTES[dtype] if dtype in ITEM_BYTES else end - begin
    if not 0 <= begin <= end or min(shape, default=0) < 0 or end - begin != expected:
        raise _corrupt(file, f"{name} ({dtype}, shape {list(shape)}) cannot occupy bytes [{begin}, {end})")
    return TensorInfo(name, dtype, shape, file, data_start + begin, end - begin)


def _corrupt(file: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{file} is not a valid safetensors file: {what}; fetch the file again.")
