"""Libraries' code that only the start needed leaves the process: 35 MB of torch's.

The kernel maps code in as it runs, sixteen pages at a time, and takes it out under pressure only. Linux; elsewhere, and
where the kernel does not want to, nothing happens.
"""

import ctypes
import re
from contextlib import suppress
from pathlib import Path

MAPPING = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) r-xp \S+ \S+ \S+ +/")
MADV_DONTNEED = 4


def drop_code() -> int:
    """Take all code of libraries out of this process; what runs again is mapped again. Returns the bytes looked at."""
    dropped = 0
    with suppress(OSError, AttributeError):
        madvise = ctypes.CDLL(None).madvise
        for start, size in clean_code(Path("/proc/self/smaps").read_text()):
            if madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), MADV_DONTNEED) == 0:
                dropped += size
    return dropped


def clean_code(smaps: str) -> list[tuple[int, int]]:
    """Address and size of executable mappings of files that are as in the file: nothing in them can be lost."""
    found: list[tuple[int, int]] = []
    mapping: re.Match[str] | None = None
    for line in smaps.splitlines():
        if "-" in line.partition(" ")[0]:
            mapping = MAPPING.match(line)
        elif mapping and line.split() == ["Anonymous:", "0", "kB"]:
            start, end = (int(part, 16) for part in mapping.groups())
            found.append((start, end - start))
    return found
