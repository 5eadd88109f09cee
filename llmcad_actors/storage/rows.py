"""Small reads: a resident tensor at start-up, and the embedding rows that a pass needs.

A 128k x 4096 bf16 embedding is 1 GB; a pass needs some dozens of its rows. They are read from their byte
ranges and their pages dropped from the page cache at once.
"""

import os
from collections.abc import Iterator, Sequence
from types import TracebackType

import numpy as np

from llmcad_actors.errors import StorageError
from llmcad_actors.storage.checkpoint import TensorInfo
from llmcad_actors.storage.direct import AlignedBuffer, Bytes, DirectFile, buffer_bytes, drop_cache


def read_bytes(info: TensorInfo) -> Bytes:
    """A whole tensor, uint8 [nbytes]; leaves no page cache behind. Raises StorageError."""
    buffer = AlignedBuffer(buffer_bytes(info.nbytes))
    with DirectFile(info.file) as file:
        start = file.read_into(buffer, info.offset, info.nbytes)
    return buffer.view(start, info.nbytes)


def read_rows(info: TensorInfo, rows: Sequence[int]) -> Bytes:
    """Rows of a tensor's first axis, uint8 [len(rows), row_bytes], once. Raises StorageError, IndexError."""
    with EmbeddingReader(info) as reader:
        return reader.read_rows(rows)


class EmbeddingReader:
    """Reads rows of one tensor on demand; keeps the file open until close()."""

    def __init__(self, info: TensorInfo) -> None:
        self.info = info
        self.row_bytes = info.nbytes // info.shape[0]
        self.bytes_read = 0
        try:
            self._fd = os.open(info.file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise StorageError(f"{info.file} cannot be read: {error.strerror}; check the file and its disk.") from error
        if hasattr(os, "posix_fadvise"):  # no read-ahead: the neighbours of a row are not wanted
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_RANDOM)

    def read_rows(self, rows: Sequence[int]) -> Bytes:
        """uint8 [len(rows), row_bytes], in the order asked, repeats allowed.

        Raises StorageError, and IndexError for a row that the tensor does not have.
        """
        wanted, back = np.unique(np.asarray(rows, dtype=np.int64), return_inverse=True)
        if wanted.size and not 0 <= wanted[0] <= wanted[-1] < self.info.shape[0]:
            raise IndexError(f"rows {wanted[0]}..{wanted[-1]} of {self.info.name}: it has {self.info.shape[0]}")
        found = np.empty((wanted.size, self.row_bytes), dtype=np.uint8)
        for first, stop in _runs(wanted.tolist()):
            self._read_run(found[first:stop], int(wanted[first]))
        return found[back.reshape(-1)]

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def __enter__(self) -> "EmbeddingReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read_run(self, into: Bytes, row: int) -> None:
        """Fill `into` [rows, row_bytes] from `row` on."""
        window, offset, got = into.reshape(-1).data, self.info.offset + row * self.row_bytes, 0
        while got < into.nbytes:
            try:
                count = os.preadv(self._fd, [window[got:]], offset + got)
            except OSError as error:
                raise StorageError(f"{self.info.file} cannot be read: {error.strerror}; check its disk.") from error
            if count == 0:
                raise StorageError(f"{self.info.file} ends inside {self.info.name}; was it replaced?")
            got += count
        drop_cache(self._fd, offset, got)
        self.bytes_read += got


def _runs(sorted_rows: list[int]) -> Iterator[tuple[int, int]]:
    """Index ranges [first, stop) of consecutive rows: [3, 4, 9] -> (0, 2), (2, 3)."""
    first = 0
    for i in range(1, len(sorted_rows) + 1):
        if i == len(sorted_rows) or sorted_rows[i] != sorted_rows[i - 1] + 1:
            yield first, i
            first = i
