"""Folders of running engines: private to this user, locked while their process lives, and swept once it is gone.

A session's folder is `llmcad-*` in the temporary folder. Only this user may look into it: Ray makes what is inside
writable for all, sockets included. The lock is the kernel's, so it ends with its process, however that ends.
"""

import fcntl
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ClassVar

import psutil

from llmcad_actors.machine.cache import cache_folder

FOLDERS = "llmcad-*"
SESSION = re.compile(r"(/[^\s=]*/llmcad-[^/\s]*)(?:/ray)?/session_[\d_-]+_(\d+)(?:/|\s|$)")
"""A session of Ray in a folder of ours: the folder, and the process that began it."""

LOCK = "lock"
LONGEST_SOCKET = 107  # bytes of a socket's path, at most
SOCKET = "/llmcad-12345678/ray/session_2026-01-01_00-00-00_123456_4194304/sockets/plasma_store"
UNFINISHED_S = 600.0  # after which a folder without lock and session is none that is being made
ATTEMPTS = 5


class SessionFolder:
    """A new folder of this process; `close` removes it."""

    living: ClassVar[list["SessionFolder"]] = []  # of this process

    def __init__(self) -> None:
        self.is_ready = False  # what is to run in it does
        self.path = Path(tempfile.mkdtemp(prefix="llmcad-", dir=sessions_folder()))
        unnamed = self.path / f"{LOCK}.new"
        self._lock = os.open(unnamed, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        unnamed.rename(self.path / LOCK)  # whoever sees it finds it locked
        self.for_ray = self.path / "ray"
        self.living.append(self)

    def close(self) -> None:
        """May be called again."""
        if self._lock >= 0:
            remove(self.path)
            os.close(self._lock)
            self._lock = -1
            self.living.remove(self)


def sessions_folder() -> Path:
    """The temporary folder; /tmp where the names of Ray's sockets would be too long in it."""
    temporary = tempfile.gettempdir()
    return Path(temporary if len(os.fsencode(temporary)) + len(SOCKET) <= LONGEST_SOCKET else "/tmp")


def log_folder() -> Path:
    """Where what Ray says is kept."""
    return cache_folder() / "logs"


def remove(folder: Path) -> None:
    """With all that is in it, also what a dying process still writes."""
    for _ in range(ATTEMPTS):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return


def sweep(temporary: Path | None = None) -> list[Path]:
    """Remove the folders of this user whose processes are gone; returns them. `temporary`: default the usual place."""
    swept = []
    for folder in folders_in(temporary or sessions_folder()):
        with left_behind(folder) as is_left:
            if is_left:
                remove(folder)
                swept.append(folder)
    return swept


def folders_in(temporary: Path) -> list[Path]:
    """Of this user's sessions."""
    return [folder for folder in sorted(temporary.glob(FOLDERS)) if not folder.is_symlink() and is_mine(folder)]


@contextmanager
def left_behind(folder: Path) -> Iterator[bool]:
    """Whether the process of a session folder is gone; nobody else can find that out meanwhile."""
    try:
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        yield _is_left_unlocked(folder)
        return
    try:
        yield _is_taken(lock)
    finally:
        os.close(lock)


def _is_taken(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is_left_unlocked(folder: Path) -> bool:
    """Of a folder without a lock: of an older llmcad, or just being made, or of a process that was killed doing it."""
    try:
        changed = folder.stat().st_ctime
        found = [match for session in folder.glob("session_*_*") if (match := SESSION.search(f"{session}/"))]
        if not found:
            return time.time() - changed > UNFINISHED_S and all(file.name == f"{LOCK}.new" for file in folder.iterdir())
    except OSError:  # being removed
        return False
    return not any(is_alive(int(match[2]), changed) for match in found)


def is_alive(pid: int, since: float) -> bool:
    """The process that had this number at the time `since` lives on (numbers are used again)."""
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= since
    return False


def is_mine(file: Path) -> bool:
    with suppress(OSError):
        return file.stat().st_uid == os.getuid()
    return False
