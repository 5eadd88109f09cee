"""A memory cgroup of our own (v1 or v2): run a command under a hard cap, read its peak. As a rule it needs root."""

import mmap
import os
import signal
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
EMPTY_AFTER_S = 10.0
JOIN_AND_RUN = 'echo $$ > "$0" && exec "$@"'


@dataclass(frozen=True, slots=True)
class MemoryCgroup:
    """A folder below `/sys/fs/cgroup`."""

    folder: Path

    def command(self, words: Sequence[str]) -> list[str]:
        """`words`, run inside."""
        return ["/bin/sh", "-c", JOIN_AND_RUN, str(self.folder / "cgroup.procs"), *words]

    def peak_bytes(self) -> int | None:
        """The most that was charged at once, page cache included; None where the kernel does not tell (before 5.19)."""
        for name in ("memory.peak", "memory.max_usage_in_bytes"):
            with suppress(OSError):
                return int((self.folder / name).read_text())
        return None

    def oom_kills(self) -> int:
        """Processes that the kernel ended because the cap was reached."""
        for name in ("memory.events", "memory.oom_control"):
            with suppress(OSError):
                fields = dict(line.split() for line in (self.folder / name).read_text().splitlines())
                return int(fields.get("oom_kill", 0))
        return 0

    def processes(self) -> list[int]:
        return [int(pid) for pid in (self.folder / "cgroup.procs").read_text().split()]


@contextmanager
def memory_cgroup(limit_bytes: int | None = None, root: Path = ROOT) -> Iterator[MemoryCgroup]:
    """A new cgroup; removed at the end, with what is still running in it. Raises `OSError` where none can be made."""
    is_v2 = (root / "cgroup.controllers").exists()
    folder = (root if is_v2 else root / "memory") / f"llmcad-{os.getpid()}-{uuid.uuid4().hex[:6]}"
    folder.mkdir()
    cgroup = MemoryCgroup(folder)
    try:
        if limit_bytes is not None:
            whole_pages = -(-limit_bytes // mmap.PAGESIZE) * mmap.PAGESIZE  # the kernel rounds down
            (folder / ("memory.max" if is_v2 else "memory.limit_in_bytes")).write_text(str(whole_pages))
            with suppress(OSError):  # a kernel without swap accounting has no such file
                (folder / "memory.swap.max").write_text("0") if is_v2 else None
        yield cgroup
    finally:
        _remove(cgroup)


def _remove(cgroup: MemoryCgroup) -> None:
    deadline = time.monotonic() + EMPTY_AFTER_S
    while True:
        with suppress(OSError):
            cgroup.folder.rmdir()
            return
        if time.monotonic() > deadline:
            for pid in cgroup.processes():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            deadline += EMPTY_AFTER_S
        time.sleep(0.1)
