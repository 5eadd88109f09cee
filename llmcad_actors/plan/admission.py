"""Whether what a plan takes is free now: asked before anything starts, so that the kernel need not kill anyone.

An engine that has just been started has not touched yet what it planned, and the machine still calls that free. So
every engine of a user leaves a note of its plan in shared memory, locked as long as it lives; what it has not taken
yet is taken off for the next one.
"""

import fcntl
import json
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

import psutil

from llmcad_actors.core.budget import format_size
from llmcad_actors.errors import MemoryCapError
from llmcad_actors.machine.limits import SHARED_MEMORY, FreeMemory, free_memory, ram_bytes
from llmcad_actors.machine.memory import measure, process_pss
from llmcad_actors.plan.footprint import CALLER
from llmcad_actors.plan.job import Prepared

MB = 1_000_000
Free = Callable[[], FreeMemory]


class Admission:
    """A running engine's note, until it is closed; a note whose process is dead counts no more."""

    def __init__(self, note: IO[str] | None) -> None:
        self._note = note

    def close(self) -> None:
        """The engine has ended."""
        if self._note is not None:
            with suppress(OSError):
                os.unlink(self._note.name)
            self._note.close()
            self._note = None


def admit(prepared: Prepared, free: Free = free_memory, folder: Path | None = None) -> Admission:
    """Note the plan down, if it fits what is free and not promised to another engine. Raises `MemoryCapError` if not.

    folder: where notes lie; default: the user's own in shared memory.
    """
    with _notes(folder or _folder()) as notes:
        if (why := _shortage(prepared, free(), notes)) is not None:
            raise MemoryCapError(why)
        return Admission(None if notes is None else _write(notes, prepared.memory.total_bytes))


def shortage(prepared: Prepared, free: Free = free_memory, folder: Path | None = None) -> str | None:
    """Why the plan cannot be started now, and what to do; None where it can. Arguments as for `admit`."""
    with _notes(folder or _folder()) as notes:
        return _shortage(prepared, free(), notes)


def _shortage(prepared: Prepared, machine: FreeMemory, notes: Path | None) -> str | None:
    here = min(process_pss(os.getpid())[0], CALLER)  # of what is planned, this process has that already
    promised = {} if notes is None else _promised(notes, machine)
    room = machine.free_bytes - sum(promised.values()) + here
    needed, least = prepared.memory.total_bytes, prepared.least_bytes
    if needed <= room:
        return None
    others = ", ".join(f"process {pid} ({format_size(size)} more)" for pid, size in promised.items() if size)
    taken = f" beside what other llmcad engines have planned for themselves: {others}" if others else ""
    fits = f"give --memory {max(room, 0) // MB}MB or less"
    advice = fits if least <= room else f"it cannot do with less than {format_size(least)}"
    return (
        f"this run takes {format_size(needed)}, and {format_size(max(room, 0))} of memory is free now{taken}; "
        f"{advice}, or close the other {'engine' if others else 'programs'} first"
    )


def _folder() -> Path:
    return SHARED_MEMORY / f"llmcad-{os.getuid()}"


@contextmanager
def _notes(folder: Path) -> Iterator[Path | None]:
    """The folder of notes, locked: of two engines that start at once, the second sees the first one's note.

    None where there can be none, or where it is another user's: then what is free has to do.
    """
    with ExitStack() as stack:
        found: Path | None = folder
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            status = folder.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
                raise PermissionError
            lock = stack.enter_context((folder / "lock").open("a"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            found = None
        yield found


def _write(folder: Path, total_bytes: int) -> IO[str]:
    note = tempfile.NamedTemporaryFile("w", dir=folder, suffix=".json", delete=False)  # noqa: SIM115
    json.dump({"pid": os.getpid(), "bytes": total_bytes, "cgroup": _cgroup()}, note)
    note.flush()
    fcntl.flock(note, fcntl.LOCK_EX)
    return note


def _promised(folder: Path, machine: FreeMemory) -> dict[int, int]:
    """Bytes that other engines have planned and not taken yet, by process, where they come out of the same memory."""
    planned: dict[int, int] = {}
    shares_ram = machine.limit_bytes == ram_bytes()
    for note in folder.glob("*.json"):
        with suppress(OSError, ValueError, KeyError, TypeError):
            if _is_dead(note):
                note.unlink()
                continue
            told = json.loads(note.read_text())
            if shares_ram or told["cgroup"] == _cgroup():
                planned[told["pid"]] = planned.get(told["pid"], 0) + told["bytes"]
    return {pid: max(0, size - _used(pid, size)) for pid, size in planned.items()}


def _is_dead(note: Path) -> bool:
    with note.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def _used(pid: int, otherwise: int) -> int:
    """What a process and its descendants take; `otherwise` where it cannot be seen from here."""
    try:
        return measure(psutil.Process(pid)).total
    except psutil.Error:
        return otherwise


def _cgroup() -> str:
    with suppress(OSError):
        return Path("/proc/self/cgroup").read_text()
    return ""
