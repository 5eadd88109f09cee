"""Which file it was that was read, and whether it still is that one, unchanged."""

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from llmcad_actors.errors import StorageError


@dataclass(frozen=True, slots=True)
class Stamp:
    """What changes when a file is written to, cut, or replaced by another one of its name."""

    device: int
    inode: int
    nbytes: int
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> "Stamp":
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)

    def __str__(self) -> str:
        """Size and time, for a message."""
        return f"{self.nbytes:,} bytes of {datetime.fromtimestamp(self.mtime_ns / 1e9):%Y-%m-%d %H:%M:%S}"


def stamps_of(files: Iterable[Path]) -> dict[Path, Stamp]:
    """Of those that are there; whoever opens them says what is wrong with the others."""
    stamps = {}
    for file in sorted(files):
        with suppress(OSError):
            stamps[file] = Stamp.of(file.stat())
    return stamps


def check_unchanged(stamps: Mapping[Path, Stamp]) -> None:
    """Raises `StorageError` for the first file that is not as it was when its stamp was taken."""
    for file, before in stamps.items():
        try:
            now = Stamp.of(file.stat())
        except OSError as error:
            raise StorageError(
                f"{file} went away while it was in use ({error.strerror}); put it back, and start again"
            ) from None
        if now != before:
            raise StorageError(
                f"{file} changed while it was in use: {_difference(before, now)}; this run cannot go on: start "
                "again with the file as it is to stay"
            )


def _difference(before: Stamp, now: Stamp) -> str:
    if str(before) == str(now):
        return "another file has taken its place" if before.inode != now.inode else "it was written to"
    return f"it had {before}, and has {now}"
