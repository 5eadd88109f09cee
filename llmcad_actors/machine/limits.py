"""How much memory this process may really use: RAM, or less where a cgroup (v1 or v2) says so. Reads files only.

A limit of any ancestor binds too, so the least one counts. Functions take the root of the file system that they
look at. Knows nothing of models or plans.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llmcad_actors.core.sizes import format_size
from llmcad_actors.errors import StorageError

ROOT = Path("/")
SHARED_MEMORY = Path("/dev/shm")
SPARED = 16
"""Of what is free, this part is left to others when a cap is lowered to it."""

V1_FILES: tuple[str, ...] = ("memory.limit_in_bytes",)
V2_FILES: tuple[str, ...] = ("memory.max", "memory.high")


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """The least of RAM and the limits of the process's cgroups."""

    limit_bytes: int
    ram_bytes: int
    source: str  # "RAM", or the file that sets the limit

    @property
    def is_cgroup(self) -> bool:
        return self.limit_bytes < self.ram_bytes

    def __str__(self) -> str:
        size = format_size(self.limit_bytes)
        return f"{size}, which {self.source} allows" if self.is_cgroup else f"{size} of RAM"


@dataclass(frozen=True, slots=True)
class FreeMemory:
    """Where memory is shortest: RAM, or one of the process's cgroups."""

    free_bytes: int  # with what the kernel can take back from the page cache
    limit_bytes: int


@dataclass(frozen=True, slots=True)
class SharedMemory:
    """The file system that the object store lives in."""

    directory: Path
    total_bytes: int
    free_bytes: int


def memory_limit(root: Path = ROOT) -> MemoryLimit:
    """What applies to this process now. Raises `StorageError` where `/proc` does not tell the size of RAM."""
    ram = ram_bytes(root)
    found = [(limit, file.name == "memory.stat", str(file)) for file, limit in cgroup_limits(root) if limit < ram]
    limit, _, source = min(found, default=(ram, False, "RAM"))  # the file that sets it rather than one that repeats it
    return MemoryLimit(limit, ram, source)


def ram_bytes(root: Path = ROOT) -> int:
    """RAM of the machine, in bytes."""
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) << 10
    raise StorageError(f"{root / 'proc/meminfo'} does not say how much RAM there is; llmcad needs Linux with /proc")


def cgroup_limits(root: Path = ROOT) -> list[tuple[Path, int]]:
    """(file, bytes) of every memory limit on this process: its own cgroup's and its ancestors'."""
    found = []
    for folder, names in _folders(root):
        found += [(folder / name, limit) for name in names if (limit := _number(folder / name)) is not None]
        if names == V1_FILES and (limit := _hierarchical(folder)) is not None:
            found.append((folder / "memory.stat", limit))  # of ancestors that a container does not see
    return found


def free_memory(root: Path = ROOT) -> FreeMemory:
    """What this process can still get now. Raises `StorageError` where `/proc` does not tell."""
    found = [FreeMemory(_fields(root / "proc/meminfo").get("MemAvailable:", 0) << 10, ram_bytes(root))]
    for folder, names in _folders(root):
        used_file, prefix = ("memory.usage_in_bytes", "total_") if names == V1_FILES else ("memory.current", "")
        limits = [limit for name in names if (limit := _number(folder / name)) is not None]
        used = _number(folder / used_file)
        if limits and used is not None:
            stat = _fields(folder / "memory.stat")
            cached = sum(stat.get(f"{prefix}{kind}_file", 0) for kind in ("active", "inactive"))
            found.append(FreeMemory(min(limits) - used + cached, min(limits)))
    return min(found, key=lambda each: each.free_bytes)


def within(cap_bytes: int, limit: MemoryLimit) -> tuple[int, tuple[str, ...]]:
    """The cap, lowered to the limit where it is above it, and what the user should be told about that."""
    if cap_bytes <= limit.limit_bytes:
        return cap_bytes, ()
    return limit.limit_bytes, (f"the memory cap of {format_size(cap_bytes)} is lowered to {limit}",)


def within_free(cap_bytes: int, needed_bytes: int, free: FreeMemory) -> tuple[int, tuple[str, ...]]:
    """A cap whose plan needs more than is free now, lowered to what is free, and what the user should be told.

    For a cap that was given as a share of the machine, or not at all; a size is meant as it stands.
    """
    most = max(free.free_bytes - free.free_bytes // SPARED, 1)
    if needed_bytes <= most:
        return cap_bytes, ()
    return most, (f"the memory cap of {format_size(cap_bytes)} is lowered to {format_size(most)}: no more is free now",)


def shared_memory(directory: Path = SHARED_MEMORY) -> SharedMemory:
    """Raises `StorageError` where there is none."""
    try:
        usage = shutil.disk_usage(directory)
    except OSError as error:
        raise StorageError(
            f"{directory} cannot be used for the object store: {error.strerror}; "
            f"mount it (mkdir -p {directory} && mount -t tmpfs tmpfs {directory})"
        ) from None
    return SharedMemory(directory, usage.total, usage.free)


def check_shared_memory(store_bytes: int, directory: Path = SHARED_MEMORY) -> None:
    """Raises `StorageError` when the shared-memory file system cannot hold an object store of `store_bytes`."""
    found = shared_memory(directory)
    if found.free_bytes < store_bytes:
        raise StorageError(
            f"{directory} has {found.free_bytes >> 20} MiB free, the object store needs {_mib(store_bytes)} MiB; "
            f"{enlarging(found, store_bytes)}, or give a smaller --memory"
        )


def enlarging(found: SharedMemory, needed_bytes: int) -> str:
    """How to make room for `needed_bytes` more than what is used now."""
    size = _mib(found.total_bytes - found.free_bytes + needed_bytes) + 64
    return f"enlarge it (mount -o remount,size={size}M {found.directory}; in Docker --shm-size={size}m)"


def _mib(num_bytes: int) -> int:
    return -(-num_bytes >> 20)


def _folders(root: Path) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """Folders of this process's memory cgroups, from its own up to the mount, and the files that hold limits there."""
    paths = _own_cgroups(root)
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        (mounted, mount_point), (kind, _, options) = before.split()[3:5], after.split()[:3]
        if kind == "cgroup" and "memory" in options.split(",") and "memory" in paths:
            controller, names = "memory", V1_FILES
        elif kind == "cgroup2" and "" in paths:
            controller, names = "", V2_FILES
        else:
            continue
        for folder in _upward(root / mount_point.lstrip("/"), mounted, paths[controller]):
            yield folder, names


def _own_cgroups(root: Path) -> dict[str, str]:
    """This process's cgroup by controller; under "" the one of cgroup v2."""
    found: dict[str, str] = {}
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        found |= dict.fromkeys(controllers.split(","), path)
    return found


def _upward(mount_point: Path, mounted: str, own: str) -> Iterator[Path]:
    """A container may see only a part of the hierarchy: `mounted` is the cgroup that stands at the mount point."""
    relative = os.path.relpath(own, mounted)
    if relative.startswith(".."):  # this process's cgroup cannot be seen from here
        relative = "."
    folder = mount_point / relative
    while folder != mount_point:
        yield folder
        folder = folder.parent
    yield mount_point


def _hierarchical(folder: Path) -> int | None:
    for line in _lines(folder / "memory.stat"):
        if line.startswith("hierarchical_memory_limit "):
            return int(line.split()[1])
    return None


def _fields(file: Path) -> dict[str, int]:
    """Lines of a name and a number."""
    return {words[0]: int(words[1]) for line in _lines(file) if len(words := line.split()) > 1 and words[1].isdigit()}


def _number(file: Path) -> int | None:
    """None: no such file, or no limit."""
    text = "".join(_lines(file)).strip()
    return int(text) if text.isdigit() else None


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []
