"""What earlier runs left behind: processes, session folders, shared memory. Only looks, ends nothing.

Ray names a session after the process that began it (`session_<date>_<time>_<micros>_<pid>`), and llmcad's sessions
live in folders of their own (`sessions.py`): so a session whose process is gone can be told from a living one, and
from a cluster that was started by hand.
"""

import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from llmcad_actors.machine.sessions import SESSION, folders_in, is_alive, is_mine, left_behind, sessions_folder

ACTORS = ("LoaderActor", "VerifierActor", "DraftActor", "Coordinator")
SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True, slots=True)
class Orphans:
    """Left over from runs whose driver is gone."""

    pids: tuple[int, ...] = ()
    folders: tuple[Path, ...] = ()
    shared_files: tuple[Path, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.pids or self.folders or self.shared_files)

    def command(self) -> str:
        """What ends and removes them."""
        commands = []
        if self.pids:
            commands.append(f"kill -9 {' '.join(map(str, self.pids))}")
        if self.folders:
            commands.append(f"rm -r {shlex.join(map(str, self.folders))}")
        if self.shared_files:
            commands.append(f"rm {shlex.join(map(str, self.shared_files))}")
        return "; ".join(commands)


def find_orphans(temporary: Path | None = None, shared: Path = SHARED_MEMORY) -> Orphans:
    """Of this user. `temporary`: default the folder of sessions."""
    mine = list(_own_processes())
    pids = {process.pid for process in mine if _is_orphan(process)}
    in_use = {match[1] for process in mine for match in SESSION.finditer(_command_line(process))}
    folders = [
        folder
        for folder in folders_in(temporary or sessions_folder())
        if str(folder) not in in_use and _is_left(folder)
    ]
    files = [file for file in sorted(shared.glob("plasma*")) if is_mine(file)]
    return Orphans(tuple(sorted(pids)), tuple(folders), tuple(_unused(files, mine)))


def is_a_session_running() -> bool:
    """Whether a process of this user belongs to a session of llmcad's whose driver is alive."""
    return any(SESSION.search(_command_line(process)) and not _is_orphan(process) for process in _own_processes())


def _own_processes() -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.uids().real == os.getuid() and process.status() != psutil.STATUS_ZOMBIE:
                yield process


def _is_orphan(process: psutil.Process) -> bool:
    """A daemon of a session whose driver is gone, or an actor without a raylet above it."""
    line = _command_line(process)
    with suppress(psutil.Error):
        if match := SESSION.search(line):
            return process.pid != int(match[2]) and not is_alive(int(match[2]), process.create_time())
        if line.startswith(tuple(f"ray::{name}" for name in ACTORS)):
            parent = process.parent()
            return parent is None or parent.name() != "raylet"
    return False


def _is_left(folder: Path) -> bool:
    with left_behind(folder) as is_left:
        return is_left


def _unused(files: Sequence[Path], processes: Sequence[psutil.Process]) -> list[Path]:
    """Files that no process has open or mapped."""
    if not files:
        return []
    used: set[str] = set()
    for process in processes:
        with suppress(OSError):
            used |= {_target(entry) for entry in Path(f"/proc/{process.pid}/fd").iterdir()}
            used |= {line.split()[-1] for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines()}
    return [file for file in files if str(file) not in used]


def _target(link: Path) -> str:
    """Empty once the link is gone."""
    try:
        return os.readlink(link)
    except OSError:
        return ""


def _command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
