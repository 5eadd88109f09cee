"""Read byte ranges of a file past the page cache (O_DIRECT), into page-aligned memory.

Weights are kept by us: a copy in the page cache would only take memory that the cap counts.
O_DIRECT wants file offset, length and memory aligned; every range is therefore widened to whole blocks of
4096 bytes, and the caller is told where in the buffer its bytes begin. Where a file system refuses O_DIRECT,
reads are buffered and their pages dropped straight after.
"""

import contextlib
import errno
import mmap
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from llmcad_actors.errors import StorageError

Bytes = npt.NDArray[np.uint8]
OpenFile = Callable[[Path, int], int]  # os.open's signature

BLOCK = 4096
_O_DIRECT = getattr(os, "O_DIRECT", 0)  # 0: this system has none


def align_down(n: int) -> int:
    return n - n % BLOCK


def align_up(n: int) -> int:
    return align_down(n + BLOCK - 1)


def span_bytes(offset: int, nbytes: int) -> int:
    """Bytes of buffer that reading [offset, offset + nbytes) takes, widened to whole blocks."""
    return align_up(offset + nbytes) - align_down(offset)


def buffer_bytes(nbytes: int) -> int:
    """A buffer of this size takes any range of `nbytes`, wherever it begins."""
    return align_up(nbytes) + BLOCK


class AlignedBuffer:
    """Page-aligned private memory of `size` bytes (rounded up to whole blocks), for reuse; in huge pages if possible.

    `populate` touches every page now: first touch later costs more than the read itself.
    """

    def __init__(self, size: int, *, populate: bool = False) -> None:
        self.size = align_up(max(size, 1))
        self._memory: Any = mmap.mmap(-1, self.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without them
                self._memory.madvise(mmap.MADV_HUGEPAGE)
        if populate:
            self.view(0, self.size)[::BLOCK] = 0

    @classmethod
    def over(cls, memory: Any, size: int) -> "AlignedBuffer":
        """A buffer on memory of someone else's: writable, page-aligned, `size` bytes."""
        buffer = cls.__new__(cls)
        buffer.size, buffer._memory = size, memory
        return buffer

    @classmethod
    def for_range(cls, nbytes: int, *, populate: bool = False) -> "AlignedBuffer":
        """A buffer that takes any range of `nbytes`, wherever in a file it begins."""
        return cls(buffer_bytes(nbytes), populate=populate)

    def view(self, start: int, nbytes: int) -> Bytes:
        """A writable window, uint8 [nbytes]; it keeps the memory alive."""
        if not 0 <= start <= start + nbytes <= self.size:
            raise ValueError(f"window [{start}, {start + nbytes}) lies outside a buffer of {self.size} bytes")
        return np.frombuffer(self._memory, dtype=np.uint8, count=nbytes, offset=start)

    def close(self) -> None:
        """Give the memory back now, or, while views of it live, with the last of them."""
        with contextlib.suppress(BufferError):
            self._memory.close()


class DirectFile:
    """One file read with O_DIRECT, or buffered where the file system refuses that (`direct` is False).

    Safe to use from several threads. Raises StorageError when the file is absent, short or unreadable.
    """

    def __init__(self, path: Path, *, direct: bool = True, open_file: OpenFile = os.open) -> None:
        self.path = path
        self.direct = direct and _O_DIRECT != 0
        self._open_file = open_file
        self._lock = threading.Lock()
        self._retired: list[int] = []
        self._fd = self._open()

    def read_into(self, buffer: AlignedBuffer, offset: int, nbytes: int, at: int = 0) -> int:
        """Read [offset, offset + nbytes) into `buffer` from position `at` (a multiple of 4096) on.

        Returns where in the buffer the wanted bytes begin.
        """
        begin = align_down(offset)
        self.read_span(buffer.view(at, span_bytes(offset, nbytes)), begin, offset + nbytes)
        return at + offset - begin

    def read_span(self, window: Bytes, begin: int, end: int) -> int:
        """Fill `window` from the aligned offset `begin`, at least up to `end`; returns the bytes read.

        `window` covers whole blocks. The file may end inside the last one, but not before `end`.
        """
        got = 0
        while begin + got < end:
            # A short read may stop inside a block: O_DIRECT can only go on from that block's start.
            start = align_down(got)
            count = self._pread(window[start:], begin + start)
            if start + count <= got:
                raise _too_short(self.path, begin + got, end)
            got = start + count
        if not self.direct:
            drop_cache(self._fd, begin, got)
        return got

    def close(self) -> None:
        for fd in (*self._retired, self._fd):
            if fd >= 0:
                os.close(fd)
        self._retired, self._fd = [], -1

    def __enter__(self) -> "DirectFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _pread(self, window: Bytes, offset: int) -> int:
        fd, direct = self._fd, self.direct
        try:
            return os.preadv(fd, [window.data], offset)
        except OSError as error:
            if not (direct and error.errno == errno.EINVAL):
                raise _unreadable(self.path, error) from error
        self._go_buffered()
        return self._pread(window, offset)

    def _go_buffered(self) -> None:
        # The old descriptor stays open until close(): another thread may be reading through it.
        with self._lock:
            if self.direct:
                self._retired.append(self._fd)
                self.direct = False
                self._fd = self._open()

    def _open(self) -> int:
        flags = os.O_RDONLY | os.O_CLOEXEC
        try:
            if self.direct:
                try:
                    return self._open_file(self.path, flags | _O_DIRECT)
                except OSError as error:
                    if error.errno != errno.EINVAL:
                        raise
                    self.direct = False
            return self._open_file(self.path, flags)
        except OSError as error:
            raise _unreadable(self.path, error) from error


def drop_cache(fd: int, offset: int, nbytes: int) -> None:
    """Drop the page cache of a range. Only whole pages go, hence the widening."""
    fadvise: Any = getattr(os, "posix_fadvise", None)
    if fadvise is not None:
        fadvise(fd, align_down(offset), span_bytes(offset, nbytes), os.POSIX_FADV_DONTNEED)


def _too_short(path: Path, found: int, expected: int) -> StorageError:
    return StorageError(f"{path} ends at byte {found:,} instead of {expected:,} or later; was it replaced?")


def _unreadable(path: Path, error: OSError) -> StorageError:
    return StorageError(f"{path} cannot be read: {error.strerror or error}; check the file and its disk.")
