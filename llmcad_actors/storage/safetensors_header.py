"""Read one safetensors file's header: which tensor lies where. Knows nothing of models.

    file := header length (8 bytes, little endian) | header (JSON) | data

The header maps each name to dtype, shape and [begin, end) within the data. Only the header is read, and nothing in it
is believed that the file does not bear out: the tensors must cover the data once, without a gap, as the format says;
so a truncated download, and one that was tampered with, are found before anything starts.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmcad_actors.core.quoting import quoted, shown
from llmcad_actors.errors import CheckpointError
from llmcad_actors.storage.small_file import opened, parse_json

# Bytes per element of the dtypes safetensors stores in whole bytes; which are usable is decided elsewhere.
ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("BF16", "F16", "I16", "U16"), 2),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
}
MAX_HEADER_BYTES = 16_000_000  # some 100,000 tensors; a header takes some ten times its bytes to read
MAX_AXES = 8


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
    with opened(file) as (stream, size):
        length = int.from_bytes(stream.read(8), "little")
        _check_length(file, size, length)
        header = stream.read(length)
    entries, data_start = _parse(file, header), 8 + length
    infos = {name: _tensor(file, name, entry, data_start, size) for name, entry in entries.items()}
    end = _check_cover(file, infos.values(), data_start)
    _check_size(file, size, end)
    return infos


def _check_length(file: Path, size: int, length: int) -> None:
    if size < 8 or (length <= MAX_HEADER_BYTES and size < 8 + length):
        raise CheckpointError(f"{shown(file)} is truncated: its {size:,} bytes do not hold its header; fetch it again.")
    if length > MAX_HEADER_BYTES:
        raise _corrupt(file, f"it declares a header of {length:,} bytes (limit {MAX_HEADER_BYTES:,})")


def _check_size(file: Path, size: int, declared: int) -> None:
    if size != declared:
        word = "truncated" if size < declared else "longer than declared"
        raise CheckpointError(
            f"{shown(file)} is {word}: {size:,} bytes on disk, its header declares {declared:,}; fetch it again."
        )


def _parse(file: Path, header: bytes) -> Mapping[str, Any]:
    try:
        entries = parse_json(header, _without_repeats)
    except ValueError as error:
        raise _corrupt(file, f"the header is not JSON ({shown(error)})") from None
    if not isinstance(entries, dict):
        raise _corrupt(file, "the header is not a JSON object")
    entries.pop("__metadata__", None)
    return entries


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{quoted(name)} stands in it more than once")
    return entries


def _tensor(file: Path, name: str, entry: Any, data_start: int, size: int) -> TensorInfo:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise _malformed(file, name, entry) from None
    if not isinstance(dtype, str) or not isinstance(shape, list) or len(shape) > MAX_AXES:
        raise _malformed(file, name, entry)
    if not all(_is_count(number) for number in (*shape, begin, end)):
        raise _malformed(file, name, entry)
    expected = math.prod(shape) * ITEM_BYTES[dtype] if dtype in ITEM_BYTES else end - begin
    if begin > end or end - begin != expected or max(shape, default=0) > 2 * size:
        what = f"{shown(name)} ({shown(dtype)}, shape {quoted(shape)}) cannot occupy bytes [{begin}, {end})"
        raise _corrupt(file, what)
    return TensorInfo(name, dtype, tuple(shape), file, data_start + begin, end - begin)


def _is_count(number: Any) -> bool:
    return type(number) is int and 0 <= number < 1 << 62


def _check_cover(file: Path, infos: Iterable[TensorInfo], data_start: int) -> int:
    """Each tensor begins where the one before it ends; returns where the last one does."""
    reached = data_start
    for info in sorted(infos, key=lambda info: (info.offset, info.nbytes)):
        if info.offset != reached:
            word = "overlaps the tensor before it" if info.offset < reached else "leaves a gap before it"
            begin = info.offset - data_start
            raise _corrupt(file, f"{shown(info.name)}, at byte {begin:,} of the data, {word}")
        reached += info.nbytes
    return reached


def _malformed(file: Path, name: str, entry: Any) -> CheckpointError:
    return _corrupt(file, f"the entry of {shown(name)} is malformed ({quoted(entry)})")


def _corrupt(file: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{shown(file)} is not a valid safetensors file: {what}; fetch the file again.")
