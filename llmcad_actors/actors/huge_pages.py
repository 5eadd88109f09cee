"""Map shared memory in huge pages, so that a disk can write to it in long runs.

Pages of a shared-memory file are taken one by one and lie scattered; a disk that is given thousands of 4 KiB pieces
per request may run at half its speed. Linux 6.1 and newer gather them on request (MADV_COLLAPSE), whatever the
system's setting for huge pages. A huge page is one entry of the page table only where memory and file are aligned
alike, hence a mapping of our own: every read then looks up hundreds of times fewer of them. Everything here is a
wish: where it cannot be had, nothing is lost but speed.
"""

import ctypes
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HUGE = 2 << 20
MADV_COLLAPSE = 25
_NO_ACCESS, _READ_WRITE = 0, 3
_SHARED_FIXED, _PRIVATE_ANONYMOUS = 0x11, 0x22
_FAILED = ctypes.c_void_p(-1).value

Memory = ctypes.Array[ctypes.c_uint8]


def in_huge_pages(address: int, nbytes: int, owner_pid: int) -> Memory | None:
    """The shared memory that is mapped at `address`, mapped once more and its pages gathered; None where that fails.

    The mapping ends with the last use of what is returned. owner_pid: a process that holds the memory's file open.
    """
    try:
        start, offset, inode = _mapping(address)
        with _opened(owner_pid, inode) as fd:
            return _mapped(fd, address - start + offset, nbytes)
    except (OSError, StopIteration, AttributeError, ValueError):
        return None


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


def _mapped(fd: int, offset: int, nbytes: int) -> Memory:
    """[offset, offset + nbytes) of the file, with what is before it in its first huge page. Raises OSError."""
    libc = _libc()
    first = offset // HUGE * HUGE
    length = offset + nbytes - first
    reserved = libc.mmap(None, length + HUGE, _NO_ACCESS, _PRIVATE_ANONYMOUS, -1, 0)
    if reserved == _FAILED:
        raise OSError(ctypes.get_errno(), "no room to map the window once more")
    memory = (ctypes.c_uint8 * nbytes).from_address(-(-reserved // HUGE) * HUGE + offset - first)
    weakref.finalize(memory, libc.munmap, reserved, length + HUGE).atexit = False
    base = ctypes.addressof(memory) - (offset - first)
    if libc.mmap(base, length, _READ_WRITE, _SHARED_FIXED, fd, first) == _FAILED:
        raise OSError(ctypes.get_errno(), "the window cannot be mapped once more")
    whole = range(-(-offset // HUGE) * HUGE - first, length - HUGE + 1, HUGE)
    for step in whole:
        libc.madvise(base + step, HUGE, MADV_COLLAPSE)  # one by one: what is not gathered stays as it is
    return memory


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc
