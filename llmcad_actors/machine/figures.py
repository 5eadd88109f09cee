"""What `llmcad doctor` measured on this machine, kept for planning: the disk's rate, the cores' rate. No torch here.

`doctor.json` in the cache folder holds disks by device number (`254:0`) and cores by model and count.
"""

import json
import os
import platform
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from llmcad_actors.core.quoting import quoted
from llmcad_actors.errors import CheckpointError
from llmcad_actors.machine.cache import cache_folder
from llmcad_actors.machine.load import Taken
from llmcad_actors.storage.small_file import read_object

VERSION = 3
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, slots=True)
class DiskRate:
    """Bytes per second with so many threads and so large requests: the median of several reads."""

    threads: int
    chunk_bytes: int
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class DiskFigures:
    """Reads of one file system."""

    bytes_per_s: float  # sustained, with the threads and the chunk below
    threads: int
    chunk_bytes: int
    is_direct: bool  # O_DIRECT is possible
    rates: tuple[DiskRate, ...] = ()

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Self:
        """Raises KeyError, TypeError or ValueError for what no measurement is."""
        rates = tuple(DiskRate(**rate) for rate in data["rates"])
        threads, chunk_bytes = _count(data["threads"]), _count(data["chunk_bytes"])
        return cls(_rate(data["bytes_per_s"]), threads, chunk_bytes, bool(data["is_direct"]), rates)


@dataclass(frozen=True, slots=True)
class ComputeFigures:
    """Products of [rows, columns] with a layer-sized matrix that no cache holds, whole layers, and copies in memory.

    Rates are in FLOP per second, by the type that is computed in ("bfloat16", "float32") and rows. The weights are
    stored in bfloat16.
    """

    threads: int
    matrix: tuple[int, int]
    matmul_flops: Mapping[str, Mapping[int, float]]
    copy_bytes_per_s: float
    layer_flops: Mapping[str, Mapping[int, float]]  # of a layer's products, in the time that the whole layer takes

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Self:
        """Raises KeyError, TypeError or ValueError for what no measurement is."""
        rows, columns = (_count(size) for size in data["matrix"])
        products, layers = _by_rows(data["matmul_flops"]), _by_rows(data["layer_flops"])
        return cls(_count(data["threads"]), (rows, columns), products, _rate(data["copy_bytes_per_s"]), layers)

    def product_seconds(self, rows: int, dtype: str) -> float:
        """Time of multiplying so many rows with the matrix."""
        return self.matrix[0] * self.matrix[1] * _seconds_per_number(self.matmul_flops[dtype], rows)

    def pass_seconds(self, rows: int, dtype: str, parameters: int, stored_bytes: int = 2) -> float:
        """Time of a pass over so many rows through layers of so many `parameters` in all.

        Between measured row counts the time is taken as linear, beyond them the rate as constant. A single row is bound
        by memory: wider weights take as much longer, and more rows never less than that. Raises `KeyError` for a dtype
        that was not measured.
        """
        one_row = _seconds_per_number(self.layer_flops[dtype], 1) * stored_bytes / 2
        return parameters * max(one_row, _seconds_per_number(self.layer_flops[dtype], rows))


def _by_rows(rates: Mapping[str, Mapping[str, float]]) -> dict[str, dict[int, float]]:
    """JSON's keys are text. Both types that a target computes in, each with something measured."""
    found = {dtype: {_count(int(rows)): _rate(rate) for rows, rate in rates[dtype].items()} for dtype in DTYPES}
    if not all(found.values()):
        raise ValueError("nothing was measured")
    return found


def _count(value: Any) -> int:
    if type(value) is not int or not 0 < value < 1 << 40:
        raise ValueError(f"not a count: {quoted(value)}")
    return value


def _rate(value: Any) -> float:
    """Per second; whatever it is of, no machine does so much or so little."""
    if type(value) not in (int, float) or not 1.0 <= value <= 1e18:
        raise ValueError(f"not a rate: {quoted(value)}")
    return float(value)


def _seconds_per_number(flops: Mapping[int, float], rows: int) -> float:
    """Of a weight matrix, at a known rate for some row counts."""
    return _interpolated(sorted((n, 2 * n / rate) for n, rate in flops.items()), rows)


@dataclass(frozen=True, slots=True)
class Figures:
    """What planning needs to predict a pass."""

    disk: DiskFigures
    compute: ComputeFigures
    disk_taken: Taken | None = field(default=None, compare=False)
    compute_taken: Taken | None = field(default=None, compare=False)

    def __str__(self) -> str:
        """When they were taken, and beside what."""
        disk, compute = str(self.disk_taken), str(self.compute_taken)
        return f"of {disk}" if disk == compute else f"(disk: {disk}; cores: {compute})"


def figures_for(path: Path) -> Figures | None:
    """The figures for reading `path` on this machine; None where `llmcad doctor` has not measured both."""
    disk = disk_figures_for(path)
    try:
        compute = ComputeFigures.of(_read(figures_file())["cpus"][cpu_name()])
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    return Figures(disk, compute, *taken_for(path)) if disk else None


def disk_figures_for(path: Path) -> DiskFigures | None:
    """The figures of the disk that `path` is on; None where it has not been measured."""
    try:
        return DiskFigures.of(_read(figures_file())["disks"][device_of(path)])
    except (KeyError, TypeError, ValueError, AttributeError, OSError):
        return None


def taken_for(path: Path) -> tuple[Taken | None, Taken | None]:
    """When the stored figures of the disk that `path` is on, and of the cores, were taken; None: there are none."""
    stored = _read(figures_file())
    try:
        device = device_of(path)
    except OSError:
        device = ""
    return _taken(stored["disks"].get(device)), _taken(stored["cpus"].get(cpu_name()))


def remember(
    path: Path,
    disk: DiskFigures | None,
    compute: ComputeFigures | None,
    disk_taken: Taken | None = None,
    compute_taken: Taken | None = None,
) -> Path:
    """Store what was measured on `path`'s device, beside what is known of others; returns the file. Raises OSError.

    taken: default now, beside nobody knows what.
    """
    file = figures_file()
    stored = _read(file)
    if disk is not None:
        stored["disks"][device_of(path)] = asdict(disk) | _stamp(disk_taken)
    if compute is not None:
        stored["cpus"][cpu_name()] = asdict(compute) | _stamp(compute_taken)
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, prefix=file.name, delete=False) as new:
        json.dump(stored, new, indent=1)
    os.replace(new.name, file)
    return file


def _stamp(taken: Taken | None) -> dict[str, Any]:
    taken = taken or Taken(datetime.now(UTC).isoformat(timespec="seconds"))
    return {"measured_at": taken.at, "busy_cores": taken.busy_cores, "usable_cores": taken.cores}


def _taken(entry: Any) -> Taken | None:
    """Older versions stored the date alone."""
    if not isinstance(entry, dict):
        return None
    at, busy, usable = (entry.get(name) for name in ("measured_at", "busy_cores", "usable_cores"))
    if isinstance(busy, int | float) and isinstance(usable, int):
        return Taken(str(at), float(busy), usable)
    return Taken(str(at))


def figures_file() -> Path:
    return cache_folder() / "doctor.json"


def device_of(path: Path) -> str:
    """Number of the device that a file system is on, such as "254:0". Raises OSError."""
    device = path.stat().st_dev
    return f"{os.major(device)}:{os.minor(device)}"


def cpu_name() -> str:
    """Model and usable cores, such as "AMD EPYC, 2 cores"."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return f"{cpu_model()}, {cores} cores"


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _read(file: Path) -> dict[str, Any]:
    """An unreadable file is an empty one: it can be measured again."""
    try:
        stored = read_object(file)
        if stored["version"] == VERSION and isinstance(stored["disks"], dict) and isinstance(stored["cpus"], dict):
            return dict(stored)
    except (CheckpointError, KeyError):
        pass
    return {"version": VERSION, "disks": {}, "cpus": {}}


def _interpolated(known: list[tuple[int, float]], at: int) -> float:
    """Piecewise linear through (x, y); proportional to x beyond the last, constant before the first."""
    (x0, y0) = known[0]
    if at <= x0:
        return y0
    for x1, y1 in known[1:]:
        if at <= x1:
            return y0 + (y1 - y0) * (at - x0) / (x1 - x0)
        x0, y0 = x1, y1
    return y0 * at / x0
