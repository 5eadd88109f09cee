"""A folder that appears when it is complete: until then it lies beside its place, under a name of its own.

Who makes it holds a lock on it, which is the kernel's and ends with the process. So several processes may make the same
folder at once, and what a killed one left can be told from what is being written.
"""

import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

UNFINISHED = re.compile(r"(?P<name>.+?)(?:\.[0-9a-f]{8})?\.partial")
"""The name of what is not complete, and the name that it would have got. Older ones have no digits."""


@contextmanager
def appearing(
    place: Path, *, is_ours: Callable[[Path], bool], may_go_on: Callable[[Path], bool] | None = None
) -> Iterator[Path]:
    """A folder to be filled in the block, which is at `place` after it. Raises OSError.

    Where somebody else's is at `place` by then, this one is removed: the caller looks at what is there.

    is_ours: whether a folder that a killed process left may be removed. may_go_on: whether it may be filled further;
    given, a folder is left for that when the block raises; else it is removed then.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    folder, lock = _left_over(place, is_ours, may_go_on) or _new(place)
    try:
        yield folder
        _publish(folder, place)
    except BaseException:
        if may_go_on is None:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def is_being_made(folder: Path) -> bool:
    """Whether a living process fills this unfinished folder."""
    lock = _locked(folder)
    if lock is None:
        return folder.exists()
    os.close(lock)
    return False


def _new(place: Path) -> tuple[Path, int]:
    folder = place.with_name(f"{place.name}.{secrets.token_hex(4)}.partial")
    folder.mkdir()
    lock = _locked(folder)
    if lock is None:
        folder.rmdir()
        raise OSError(errno.ENOLCK, "folders cannot be locked there", str(place.parent))
    return folder, lock


def _left_over(
    place: Path, is_ours: Callable[[Path], bool], may_go_on: Callable[[Path], bool] | None
) -> tuple[Path, int] | None:
    """What a killed process left of the same folder, to go on with. What is of no use is removed."""
    for folder in sorted(place.parent.iterdir()):
        found = UNFINISHED.fullmatch(folder.name)
        if not found or found["name"] != place.name or (lock := _locked(folder)) is None:
            continue
        if may_go_on is not None and may_go_on(folder):
            return folder, lock
        if is_ours(folder):
            shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)
    return None


def _locked(folder: Path) -> int | None:
    """A lock on the folder, which closing ends; None where another has it, or it is no folder (any more)."""
    with suppress(OSError):
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock), folder.lstat()):  # and not renamed, or removed, before the lock
                return lock
        except OSError:
            pass
        os.close(lock)
    return None


def _publish(folder: Path, place: Path) -> None:
    try:
        os.rename(folder, place)  # an empty folder there is replaced
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        shutil.rmtree(folder)
