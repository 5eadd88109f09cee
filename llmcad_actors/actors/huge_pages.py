"""Gather shared memory into huge pages, so that a disk can write to it in long runs.

Pages of a shared-memory file are taken one by one and lie scattered; a disk that is given thousands of 4 KiB pieces
per request may run at half its speed. Linux 6.1 and newer gather them on request (MADV_COLLAPSE), whatever the
system's setting for huge pages. Everything here is a wish: where it cannot be had, nothing is lost but speed.
"""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

HUGE = 2 << 20
MADV_COLLAPSE = 25
_NO_ACCESS, _READ_WRITE = 0, 3
_SHARED_FIXED, _PRIVATE_ANONYMOUS = 0x11, 0x22
_FAILED = ctypes.c_void_p(-1).value


def gather(address: int, nbytes: int, owner_pid: int) -> int:
    """Gather the huge pages that lie within shared memory mapped here; returns how many bytes were.

    owner_pid: a process that holds the memory's file open.
    """
    with suppress(OSError, StopIteration, AttributeError, ValueError):
        start, offset, inode = _mapping(address)
        first = -(-(address - start + offset) // HUGE) * HUGE
        last = (address - start + offset + nbytes) // HUGE * HUGE
        if last > first:
            with _opened(owner_pid, inode) as fd:
                return _collapse(fd, first, last - first)
    return 0


def _mapping(address: int) -> tuple[int, int, int]:
    """Where the mapping around `address` begins, its offset in the file, and the file's inode."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, offset, _, inode = line.split()[:5]
        start, end = (int(text, 16) for text in span.split("-"))
        if start <= address < end:
            return start, int(offset, 16), int(inode)
    raise OSError(f"nothing is mapped at {address:#x}")


@contextmanager
def _opened(pid: int, inode: int) -> Iterator[int]:
    folder = f"/proc/{pid}/fd"
    paths = (f"{folder}/{name}" for name in os.listdir(folder))
    path = next(path for path in paths if _inode(path) == inode)
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _inode(path: str) -> int:
    try:
        return os.stat(path).st_ino
    except OSError:
        return 0


def _collapse(fd: int, offset: int, nbytes: int) -> int:
    """The kernel gathers only where memory and file are aligned alike: hence a mapping of our own for a moment."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    reserved = libc.mmap(None, nbytes + HUGE, _NO_ACCESS, _PRIVATE_ANONYMOUS, -1, 0)
    if reserved == _FAILED:
        return 0
    try:
        aligned = -(-reserved // HUGE) * HUGE
        if libc.mmap(aligned, nbytes, _READ_WRITE, _SHARED_FIXED, fd, offset) == _FAILED:
            return 0
        steps = range(aligned, aligned + nbytes, HUGE)
        return sum(HUGE for step in steps if libc.madvise(step, HUGE, MADV_COLLAPSE) == 0)
    finally:
        libc.munmap(reserved, nbytes + HUGE)
