"""How much memory a process tree really uses: proportional set size, the object store counted once.

PSS divides shared pages among the processes that map them, so the sum over our processes is what the machine gives
us. Pages of the object store that nobody maps at the moment are added from the store's own file.
"""

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from llmcad_actors.core.overrun import Overrun

DRIVER, DAEMONS, STORE = "driver", "Ray daemons", "store"
ACTOR_GROUPS = {
    "Coordinator": "coordinator",
    "DraftActor": "draft",
    "VerifierActor": "verifier",
    "LoaderActor": "loader",
}


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Bytes at one moment."""

    private: int  # PSS without shared memory, all processes
    shared: int  # shared memory: the object store
    spilled: int  # object store that did not fit and went to disk files: must stay 0

    @property
    def total(self) -> int:
        return self.private + self.shared


def measure(root: psutil.Process) -> MemoryUse:
    """What `root` and all its descendants use now."""
    private = mapped = store = spilled = 0
    for process in (root, *_descendants(root)):
        pss, shmem = process_pss(process.pid)
        inside, outside = _store_bytes(process.pid)
        private += pss - shmem
        mapped += shmem
        store, spilled = max(store, inside), max(spilled, outside)
    return MemoryUse(private, max(mapped, store), spilled)


def by_process(root: psutil.Process) -> dict[str, int]:
    """PSS without shared memory of each process, by a readable name."""
    use: dict[str, int] = {}
    for process in (root, *_descendants(root)):
        pss, shmem = process_pss(process.pid)
        name = _readable(process)
        use[name] = use.get(name, 0) + pss - shmem
    return use


def by_group(root: psutil.Process) -> dict[str, int]:
    """Bytes of each part of llmcad: driver (`root`), its actors, Ray's daemons, the object store. Sums to `measure`."""
    use = dict.fromkeys((DRIVER, *ACTOR_GROUPS.values(), DAEMONS, STORE), 0)
    mapped = store = 0
    for process in (root, *_descendants(root)):
        pss, shmem = process_pss(process.pid)
        group = DRIVER if process.pid == root.pid else ACTOR_GROUPS.get(_readable(process), DAEMONS)
        use[group] += pss - shmem
        mapped += shmem
        store = max(store, _store_bytes(process.pid)[0])
    use[STORE] = max(mapped, store)
    return use


def process_pss(pid: int) -> tuple[int, int]:
    """(PSS, the part of it that is shared memory) in bytes; (0, 0) once the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return 0, 0
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return kib.get("Pss", 0) << 10, kib.get("Pss_Shmem", 0) << 10


def _descendants(root: psutil.Process) -> list[psutil.Process]:
    try:
        return list(root.children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def _store_bytes(pid: int) -> tuple[int, int]:
    """Bytes of the object store that a process holds open: in shared memory, and fallen back to disk files."""
    inside = outside = 0
    folder = f"/proc/{pid}/fd"
    with suppress(OSError):
        for fd in os.listdir(folder):
            with suppress(OSError):
                path = os.readlink(f"{folder}/{fd}")
                if "/plasma" in path:
                    size = os.stat(f"{folder}/{fd}").st_blocks * 512
                    inside, outside = (
                        (inside + size, outside) if path.startswith("/dev/shm") else (inside, outside + size)
                    )
    return inside, outside


def _readable(process: psutil.Process) -> str:
    try:
        words = process.cmdline()
    except psutil.Error:
        return "gone"
    if not words:
        return "gone"
    if words[0].startswith("ray::"):
        return words[0].removeprefix("ray::").split(".")[0]
    script = next((w for w in words[1:4] if w.endswith(".py") or "/bin/" in w), words[0])
    return Path(script).name


class MemoryWatcher:
    """Samples a process tree in a thread and keeps the peak."""

    def __init__(
        self, root_pid: int, *, baseline_bytes: int = 0, interval_s: float = 1.0, overrun: Overrun | None = None
    ) -> None:
        """`baseline_bytes`: what the root process used before llmcad; it is not ours and is taken off.

        overrun: what looks at every sample too.
        """
        self._root = psutil.Process(root_pid)
        self._baseline = baseline_bytes
        self._interval_s = interval_s
        self._stop = threading.Event()
        self.current_bytes = 0
        self.peak_bytes = 0
        self.spilled_bytes = 0
        self._overrun = overrun
        self._tell: Callable[[int], object] = lambda used: False
        self._thread = threading.Thread(target=self._run, name="llmcad-memory", daemon=True)

    def tell(self, look: Callable[[int], object]) -> None:
        """Call `look` with the bytes in use after each of the thread's samples; it says whether it can help."""
        self._tell = look

    def start(self) -> None:
        self._thread.start()

    def sample(self) -> int:
        """Measure once; returns the bytes in use now."""
        use = measure(self._root)
        self.current_bytes = max(0, use.total - self._baseline)
        self.spilled_bytes = max(self.spilled_bytes, use.spilled)
        self.peak_bytes = max(self.peak_bytes, self.current_bytes)
        if self._overrun is not None:
            self._overrun.record(self.current_bytes)
        return self.current_bytes

    def close(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(10)

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            used = self.sample()
            helps = bool(self._tell(used))
            if self._overrun is not None:
                self._overrun.say(used, helps)
