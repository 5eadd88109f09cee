"""Write a safetensors file tensor by tensor, with no more than one of them in memory.

The header comes first in the format, so all names, dtypes and shapes are declared before any data.
"""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from llmcad_actors.errors import StorageError
from llmcad_actors.storage.safetensors_header import ITEM_BYTES

Entry = tuple[str, str, tuple[int, ...]]  # name, dtype ("BF16", "F16", "F32"), shape
ALIGNMENT = 64  # of the data's start


class SafetensorsWriter:
    """Writes `path` atomically: it appears, complete, at close().

    As a context manager, an exception removes the partial file. Raises StorageError when the disk refuses.
    """

    def __init__(self, path: Path, entries: Sequence[Entry]) -> None:
        self.path = path
        self._entries = list(entries)
        self._next, self._started_bytes = 0, 0  # the tensor being written, and how much of it is
        self._partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            self._stream = self._partial.open("wb")
        except OSError as error:
            raise _refused(path, error) from error
        self._put(_header(self._entries))

    def write(self, name: str, array: npt.NDArray[Any]) -> None:
        """The next declared tensor; bf16 as uint16. Raises ValueError when it is not the one declared."""
        if self._started_bytes or array.shape != self._declared(name, array)[2]:
            raise ValueError(f"got {name} {array.shape}, declared is {self._declared(name, array)}")
        self.write_part(name, array)

    def write_part(self, name: str, array: npt.NDArray[Any]) -> None:
        """The next rows of a declared tensor; the one after it may follow when it is complete."""
        total = entry_bytes(self._declared(name, array))
        if self._started_bytes + array.nbytes > total:
            raise ValueError(f"{name} gets {self._started_bytes + array.nbytes:,} bytes, declared are {total:,}")
        self._put(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        self._started_bytes += array.nbytes
        if self._started_bytes == total:
            self._next, self._started_bytes = self._next + 1, 0

    def _declared(self, name: str, array: npt.NDArray[Any]) -> Entry:
        entry = self._entries[self._next] if self._next < len(self._entries) else ("nothing more", "BOOL", ())
        if name != entry[0] or array.itemsize != ITEM_BYTES[entry[1]]:
            raise ValueError(f"got {name} {array.dtype} {array.shape}, declared is {entry}")
        return entry

    def close(self) -> None:
        """Finish. Raises ValueError when declared tensors were not written."""
        if self._stream.closed:
            return
        if self._next < len(self._entries):
            self.abort()
            raise ValueError(f"{self.path}: {len(self._entries) - self._next} declared tensors were not written")
        try:
            self._stream.close()
            os.replace(self._partial, self.path)
        except OSError as error:
            self.abort()
            raise _refused(self.path, error) from error

    def abort(self) -> None:
        """Give up: remove the partial file."""
        self._stream.close()
        self._partial.unlink(missing_ok=True)

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def _put(self, data: bytes | memoryview) -> None:
        try:
            self._stream.write(data)
        except OSError as error:
            self.abort()
            raise _refused(self.path, error) from error


def write_holes(path: Path, entries: Sequence[Entry]) -> None:
    """A file of these tensors whose bytes are not written: a hole, which reads as zeros. Raises OSError."""
    header = _header(entries)
    path.write_bytes(header)
    os.truncate(path, len(header) + sum(map(entry_bytes, entries)))


def entry_bytes(entry: Entry) -> int:
    _, dtype, shape = entry
    return math.prod(shape) * ITEM_BYTES[dtype]


def _header(entries: Sequence[Entry]) -> bytes:
    # "format": transformers refuses files that do not say which framework's layout they have.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        name, dtype, shape = entry
        end = offset + entry_bytes(entry)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _refused(path: Path, error: OSError) -> StorageError:
    return StorageError(f"{path} cannot be written: {error.strerror or error}; free space or choose another folder.")
