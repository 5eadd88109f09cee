"""How fast a disk delivers to 1, 2, 4 reading threads and requests of 1 to 16 MiB, past the page cache.

Disks give bursts after an idle moment. So every setting reads several times, in turn with the others and each time
another part of the files, and the rate to plan with is the median of a longer reading without a pause.
"""

import os
import random
import shutil
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import numpy as np

from llmcad_actors.core.budget import format_size
from llmcad_actors.errors import StorageError
from llmcad_actors.machine.figures import DiskFigures, DiskRate
from llmcad_actors.storage.reader import AlignedBuffer, ParallelReader

MIB = 1 << 20
THREADS = (1, 2, 4)
CHUNKS = (1 * MIB, 4 * MIB, 8 * MIB, 16 * MIB)
PART_BYTES = 64 * MIB  # one read of a setting: 4 threads x 16 MiB
GROUP = 4  # parts of one sample of the sustained rate
READ_TIMEOUT_S = 60.0
NEARLY_BEST = 0.95  # fewer threads and smaller requests cost less: they win unless they are slower than this

OnProgress = Callable[[float], None]
"""Takes the share that is done."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is read."""

    file_bytes: int = 1024 * MIB
    rounds: int = 3
    sustained_s: float = 6.0
    limit_s: float = 90.0  # what has not been read by then stays out


QUICK = Effort(file_bytes=256 * MIB, rounds=1, sustained_s=1.5, limit_s=30.0)


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a file."""

    file: Path
    offset: int
    nbytes: int


def parts_of(files: Sequence[Path], part_bytes: int = PART_BYTES) -> list[Part]:
    """The files, cut. Raises `StorageError` when there is nothing to read."""
    found = [
        Part(file, offset, min(part_bytes, size - offset))
        for file, size in ((file, file.stat().st_size) for file in files)
        for offset in range(0, size, part_bytes)
    ]
    if not found:
        raise StorageError("there are no bytes to read; give a folder with room, or a checkpoint, as --path")
    whole = [part for part in found if part.nbytes == part_bytes]
    return whole or found


@contextmanager
def probe_file(folder: Path, effort: Effort, progress: OnProgress = lambda share: None) -> Iterator[Path]:
    """A temporary file of bytes that do not compress, on the disk itself; gone afterwards.

    Takes a quarter of the free space at most. Raises `StorageError` when there is no room, or no right to write.
    """
    try:
        size = min(effort.file_bytes, shutil.disk_usage(folder).free // 4)
        if size < PART_BYTES:
            raise StorageError(
                f"the disk of {folder} has room for a test file of {format_size(size)} only, "
                f"{format_size(PART_BYTES)} are needed; free some space or give another --path"
            )
        with tempfile.TemporaryFile(dir=folder) as file:  # it has no name: nothing stays, whatever ends us
            _fill(file.fileno(), size, effort.limit_s / 2, progress)
            yield Path(f"/proc/self/fd/{file.fileno()}")
    except OSError as error:
        raise StorageError(
            f"cannot write a test file in {folder}: {error.strerror}; give a folder that can be written, "
            "or a checkpoint's own, as --path"
        ) from None


def _fill(fd: int, size: int, limit_s: float, progress: OnProgress) -> None:
    """Write whole parts, at least one; stop early on a slow disk."""
    numbers, deadline = np.random.default_rng(), time.monotonic() + limit_s
    for done in range(0, size - PART_BYTES + 1, PART_BYTES):
        for _ in range(0, PART_BYTES, 8 * MIB):
            block = memoryview(numbers.bytes(8 * MIB))
            while block:
                block = block[os.write(fd, block) :]
        os.fsync(fd)  # a page that waits to be written would be in the way of O_DIRECT
        progress((done + PART_BYTES) / size)
        if time.monotonic() > deadline:
            break
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def measure_disk(
    parts: Sequence[Part],
    effort: Effort,
    progress: OnProgress = lambda share: None,
    clock: Callable[[], float] = time.monotonic,
) -> DiskFigures:
    """Read the parts again and again in all settings. Raises `StorageError`, `DeadlineError`."""
    deadline, ahead = clock() + effort.limit_s, cycle(parts)
    settings = [(threads, chunk) for threads in THREADS for chunk in CHUNKS]
    samples: dict[tuple[int, int], list[float]] = {}
    total = effort.rounds * len(settings)
    for number in range(total):
        if number % len(settings) == 0:
            random.Random(number).shuffle(settings)
        setting = settings[number % len(settings)]
        rates, _ = _read(setting, [next(ahead)], clock)
        samples.setdefault(setting, []).extend(rates)
        progress(number / (total + 3))
        if clock() > deadline:
            break
    table = tuple(DiskRate(*setting, statistics.median(samples[setting])) for setting in sorted(samples))
    best = best_of(table)
    sustained, is_direct = _sustained(best, ahead, effort.sustained_s, clock)
    progress(1.0)
    return DiskFigures(sustained, best.threads, best.chunk_bytes, is_direct, table)


def best_of(rates: Sequence[DiskRate]) -> DiskRate:
    """The setting that takes least of those that are nearly the fastest."""
    fastest = max(rate.bytes_per_s for rate in rates)
    return next(rate for rate in rates if rate.bytes_per_s >= NEARLY_BEST * fastest)


def _sustained(best: DiskRate, ahead: Iterator[Part], seconds: float, clock: Callable[[], float]) -> tuple[float, bool]:
    ends, rates, is_direct = clock() + seconds, list[float](), True
    while not rates or clock() < ends:
        of_parts, is_direct = _read((best.threads, best.chunk_bytes), list(islice(ahead, GROUP)), clock)
        rates.append(len(of_parts) / sum(1 / rate for rate in of_parts))
    return statistics.median(rates), is_direct


def _read(setting: tuple[int, int], parts: Sequence[Part], clock: Callable[[], float]) -> tuple[list[float], bool]:
    """Bytes per second of each part, with the next one always queued behind it, and whether O_DIRECT was used."""
    threads, chunk = setting
    buffers = deque(AlignedBuffer.for_range(part.nbytes, populate=True) for part in parts[:2])
    rates = []
    with ParallelReader(threads, chunk) as reader:
        began = clock()
        pending = deque(reader.submit(p.file, p.offset, p.nbytes, b) for p, b in zip(parts, buffers, strict=False))
        for index, part in enumerate(parts):
            pending.popleft().wait(READ_TIMEOUT_S)
            ended = clock()
            rates.append(part.nbytes / max(ended - began, 1e-9))
            began = ended
            if index + 2 < len(parts):
                after = parts[index + 2]
                pending.append(reader.submit(after.file, after.offset, after.nbytes, buffers[index % 2]))
        return rates, reader.direct
