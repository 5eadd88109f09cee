"""Is this machine fit for llmcad, and how fast is it? Checks, each with a verdict and what to do; figures for planning.

Measures disk and cores again every time and keeps the figures (`machine/figures.py`). Starts Ray once and ends it.
"""

import json
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import psutil
from packaging.requirements import Requirement

from llmcad_actors.config import EngineConfig
from llmcad_actors.core.budget import LEAST_STORE_BYTES, STORE_SLACK_BYTES, format_size, window_bytes
from llmcad_actors.core.quoting import shown
from llmcad_actors.doctor.disk import QUICK, Effort, measure_disk, parts_of, probe_file
from llmcad_actors.errors import ConfigError, LlmcadError, StorageError
from llmcad_actors.machine.cache import cache_folder
from llmcad_actors.machine.child import run_module
from llmcad_actors.machine.figures import ComputeFigures, DiskFigures, remember, taken_for
from llmcad_actors.machine.limits import MemoryLimit, enlarging, memory_limit, shared_memory
from llmcad_actors.machine.load import LoadWatch, Taken
from llmcad_actors.machine.orphans import find_orphans
from llmcad_actors.machine.versions import installed, newer_than_tested
from llmcad_actors.plan.footprint import DAEMONS, THIN_PROCESSES, TORCH_PROCESS, budget_shard
from llmcad_actors.storage.checkpoint import Checkpoint
from llmcad_actors.storage.layout import layout_of

OK, WARNING, PROBLEM = "ok", "warning", "problem"

RUNTIME_BYTES = DAEMONS + THIN_PROCESSES + 2 * TORCH_PROCESS
COMFORTABLE_STORE_BYTES = 512 << 20  # two layers of a model of some 7 billion parameters, in bfloat16
SLOW_DISK_BYTES_PER_S = 300e6
SMALL_FILES_BYTES = 512 << 20  # fewer bytes may come from the disk's own memory
MUCH_SLOWER = 2.0
COMPUTE_TIMEOUT_S = 300.0
RAY_TIMEOUT_S = 120.0
PACKAGES = ("ray", "torch", "transformers", "safetensors")

Say = Callable[[str, float | None], None]
"""Takes what is being done and the share that is done, None where that is not known."""


@dataclass(frozen=True, slots=True)
class Check:
    """A row of the report."""

    name: str
    verdict: str  # "ok" | "warning" | "problem": llmcad cannot run like this
    found: str
    advice: str = ""  # what to do; empty where all is well


@dataclass(slots=True)
class Report:
    """Everything that was found."""

    path: Path
    checks: list[Check] = field(default_factory=list)
    disk: DiskFigures | None = None
    compute: ComputeFigures | None = None
    disk_taken: Taken | None = None
    compute_taken: Taken | None = None
    kept_in: Path | None = None

    @property
    def is_fit(self) -> bool:
        return all(check.verdict != PROBLEM for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path), "kept_in": self.kept_in and str(self.kept_in)}

    def add(self, name: str, verdict: str, found: str, advice: str = "") -> None:
        self.checks.append(Check(name, verdict, found, advice if verdict != OK else ""))

    @contextmanager
    def about(self, name: str) -> Iterator[None]:
        """What llmcad raises inside becomes a problem under this name."""
        try:
            yield
        except LlmcadError as error:
            found, _, advice = str(error).partition("; ")
            self.add(name, PROBLEM, found, advice or "mend this, and run `llmcad doctor` again")


def examine(
    path: Path | None = None, *, quick: bool = False, replace: bool = False, say: Say = lambda what, share: None
) -> Report:
    """All checks. `path`: a checkpoint, whose files are read, or a folder to write a test file in; default: the cache.

    replace: keep the figures of a busy machine in place of a quiet one's.
    Raises `ConfigError` where `path` is no folder.
    """
    if path is not None and not os.path.isdir(path):  # which a name that cannot be is not either
        raise ConfigError(f"--path {shown(path)} is not a folder; give a folder to test, or a checkpoint's")
    report = Report(path or cache_folder())
    store_bytes = LEAST_STORE_BYTES
    with report.about("checkpoint"):
        store_bytes = store_needs(report.path)
    with report.about("memory"):
        check_memory(report, memory_limit())
    check_swap(report)
    with report.about("shared memory"):
        check_store(report, store_bytes)
    check_versions(report)
    check_orphans(report)
    with report.about("Ray"):
        check_ray(report, say)
    with report.about("disk"):
        check_disk(report, quick, say)
    with report.about("cores"):
        check_compute(report, quick, say)
    check_load(report, replace)
    return report


def store_needs(path: Path) -> int:
    """Bytes of the object store for the checkpoint at `path`, or the least that Ray makes."""
    if not (path / "config.json").exists():
        return LEAST_STORE_BYTES
    extent_bytes = EngineConfig(target=str(path)).extent_bytes
    shards = [budget_shard(spec, extent_bytes) for spec in layout_of(Checkpoint.open(path)).shards]
    return max(window_bytes(shards, shards) + STORE_SLACK_BYTES, LEAST_STORE_BYTES)


def check_memory(report: Report, limit: MemoryLimit) -> None:
    free = min(psutil.virtual_memory().available, limit.limit_bytes)
    found = f"{limit}; {format_size(free)} free"
    need = f"the runtime alone takes {format_size(RUNTIME_BYTES)}"
    if limit.limit_bytes < RUNTIME_BYTES:
        raise_it = f"raise the limit in {limit.source}" if limit.is_cgroup else "use a machine with more"
        report.add("memory", PROBLEM, found, f"{need}: {raise_it}")
    elif free < RUNTIME_BYTES:
        report.add("memory", PROBLEM, found, f"{need}: end other programs")
    else:
        tight = free < limit.limit_bytes // 2
        report.add("memory", WARNING if tight else OK, found, f"other programs hold much: --memory {free // 10**6}MB")


def check_swap(report: Report) -> None:
    swap = psutil.swap_memory()
    if not swap.total:
        report.add("swap", OK, "none")
        return
    verdict = WARNING if swap.used > swap.total // 10 else OK
    advice = "weights that are to stay in memory may be swapped out: give a smaller --memory, or swapoff"
    report.add("swap", verdict, f"{format_size(swap.used)} of {format_size(swap.total)} in use", advice)


def check_store(report: Report, store_bytes: int) -> None:
    found = shared_memory()
    text = f"{format_size(found.total_bytes)}, {format_size(found.free_bytes)} free"
    if found.free_bytes < store_bytes:
        verdict, needed = PROBLEM, store_bytes
    else:
        verdict, needed = (OK if found.free_bytes >= COMFORTABLE_STORE_BYTES else WARNING), COMFORTABLE_STORE_BYTES
    advice = f"the object store may need {format_size(needed)}: {enlarging(found, needed)}"
    report.add("shared memory", verdict, f"{found.directory}: {text}", advice)


def check_versions(report: Report) -> None:
    """The installed packages, against what llmcad asks for."""
    versions = {name: version for name in PACKAGES if (version := installed(name))}
    asked = {r.name: r for r in map(Requirement, _requirements()) if r.marker is None}
    wrong = [
        f"{n}{asked[n].specifier}" for n, v in versions.items() if n in asked and not asked[n].specifier.contains(v)
    ]
    missing = [name for name in PACKAGES if name not in versions]
    found = ", ".join(f"{name} {version}" for name, version in {"python": sys.version.split()[0], **versions}.items())
    verdict = PROBLEM if missing else WARNING if wrong else OK
    wanted = " ".join(f"'{name}'" for name in (*missing, *wrong))
    advice = f"llmcad is tested with others: pip install {wanted}"
    if verdict == OK and (newer := newer_than_tested()):
        verdict, (advice,) = WARNING, newer
    report.add("versions", verdict, found, advice)


def check_orphans(report: Report) -> None:
    orphans = find_orphans()
    found = ", ".join(
        f"{name}: {len(items)}"
        for name, items in (
            ("processes", orphans.pids),
            ("session folders", orphans.folders),
            ("files in shared memory", orphans.shared_files),
        )
        if items
    )
    report.add("earlier runs", WARNING if orphans else OK, found or "nothing is left", f"end them: {orphans.command()}")


def check_ray(report: Report, say: Say) -> None:
    say("starting and stopping Ray", None)
    took = json.loads(run_module("llmcad_actors.actors.ray_check", timeout_s=RAY_TIMEOUT_S).splitlines()[-1])
    report.add("Ray", OK, f"starts in {took['start_s']:.1f} s, stops in {took['stop_s']:.1f} s")
    add_ports(report, took["listens_on"])


def add_ports(report: Report, listens_on: list[str]) -> None:
    """What can be reached of a run, `listens_on` being addresses, and from where."""
    is_closed = all(ip_address(address).is_loopback for address in listens_on)
    where = "this machine alone can reach them" if is_closed else f"reached over the network: {set(listens_on)}"
    found = f"a run listens on {len(listens_on)} TCP ports; {where}; each call needs the run's own token"
    report.add("ports", OK if is_closed else WARNING, found, "close the machine to others with a firewall")


def check_disk(report: Report, quick: bool, say: Say) -> None:
    """Two rows: whether reads can pass the page cache by, and the rate."""
    effort, watch = QUICK if quick else Effort(), LoadWatch(reads_disk=True)
    files = sorted(report.path.glob("*.safetensors"))
    if files:
        figures = measure_disk(parts_of(files), effort, lambda share: say("reading the checkpoint", share))
    else:
        _make(report.path)
        with probe_file(report.path, effort, lambda share: say("writing a test file", share)) as file:
            figures = measure_disk(parts_of([file]), effort, lambda share: say("reading the test file", share))
    report.disk, report.disk_taken = figures, watch.taken()
    report.add(
        "direct reads",
        OK if figures.is_direct else WARNING,
        f"O_DIRECT is {'possible' if figures.is_direct else 'refused'} on {report.path}",
        "reads go through the page cache, which is slower: put models on ext4, xfs or btrfs, not on tmpfs or a share",
    )
    add_disk_rate(report, figures, sum(file.stat().st_size for file in files) if files else SMALL_FILES_BYTES)


def add_disk_rate(report: Report, figures: DiskFigures, num_bytes: int) -> None:
    rate = f"{figures.bytes_per_s / 1e6:.0f} MB/s sustained"
    found = f"{rate} (threads: {figures.threads}, requests of {figures.chunk_bytes >> 20} MiB)"
    if figures.bytes_per_s < SLOW_DISK_BYTES_PER_S:
        per_gb = 1e9 / figures.bytes_per_s
        report.add(
            "disk", WARNING, found, f"each streamed GB costs {per_gb:.1f} s a pass: move models to a faster disk"
        )
    elif num_bytes < SMALL_FILES_BYTES:
        size = format_size(num_bytes)
        report.add("disk", WARNING, found, f"only {size} to read, perhaps from a cache: measure a larger checkpoint")
    else:
        report.add("disk", OK, found)


def check_compute(report: Report, quick: bool, say: Say) -> None:
    """Two rows: multiplying and copying."""
    say("multiplying matrices", None)
    arguments, watch = ["--quick"] if quick else [], LoadWatch()
    text = run_module("llmcad_actors.doctor.compute", arguments, timeout_s=COMPUTE_TIMEOUT_S)
    report.compute = figures = ComputeFigures.of(json.loads(text.splitlines()[-1]))
    report.compute_taken = watch.taken()
    most = max(figures.matmul_flops["bfloat16"])
    low, high = (figures.matmul_flops[dtype][most] / 1e9 for dtype in ("bfloat16", "float32"))
    report.add(
        "matrix products",
        OK if high >= low / MUCH_SLOWER else WARNING,
        f"{most} rows: {high:.0f} GFLOP/s in float32, {low:.0f} in bfloat16 (threads: {figures.threads})",
        "float32 is slow on these cores: --dtype bfloat16 computes faster, and gives up that texts are exact",
    )
    copy = figures.copy_bytes_per_s
    is_slow = report.disk is not None and copy < 2 * report.disk.bytes_per_s
    advice = "copying is hardly faster than the disk: passes will be bound by memory, other programs may be the cause"
    report.add("memory copy", WARNING if is_slow else OK, f"{copy / 1e9:.1f} GB/s", advice)


def check_load(report: Report, replace: bool) -> None:
    """A row on what else ran, and the figures are kept: but a quiet machine's are not lost to a busy one's."""
    stored = dict(zip(("disk", "cores"), taken_for(report.path), strict=True))
    now = {"disk": report.disk_taken, "cores": report.compute_taken}
    better = {
        name: known
        for name, known in stored.items()
        if known and not known.is_busy and (taken := now[name]) and taken.is_busy and not replace
    }
    measured = [taken for taken in now.values() if taken]
    if measured:
        add_load(report, max(measured, key=lambda taken: taken.busy_cores or 0.0), better)
    save_figures(report, better)


def add_load(report: Report, taken: Taken, better: Mapping[str, Taken]) -> None:
    if better:
        dates = " and ".join(f"of the {name}, of {known.date}," for name, known in better.items())
        advice = (
            f"the earlier figures {dates} are better and stay: end other programs and run `llmcad doctor` "
            "again, or `llmcad doctor --replace` where the machine is always as busy"
        )
    else:
        advice = "the figures are those of a busy machine: end other programs and run `llmcad doctor` again"
    unknown = taken.busy_cores is None
    found = "cannot be told" if unknown else f"used {taken.busy_cores:.1f} of {taken.cores} cores during the measuring"
    report.add("other programs", WARNING if taken.is_busy else OK, found, advice)


def save_figures(report: Report, better: Collection[str] = ()) -> None:
    """Those that are not among the `better` ones. Where they cannot be stored llmcad runs as well: a warning."""
    disk = None if "disk" in better else report.disk
    compute = None if "cores" in better else report.compute
    if disk is None and compute is None:
        return
    try:
        report.kept_in = remember(report.path, disk, compute, report.disk_taken, report.compute_taken)
    except OSError as error:
        report.add("figures", WARNING, f"cannot be kept in {cache_folder()}: {error.strerror}", "set LLMCAD_CACHE")


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make {folder}: {error.strerror}; set LLMCAD_CACHE to a folder of yours") from None


def _requirements() -> list[str]:
    try:
        return metadata.requires("llmcad-actors") or []
    except metadata.PackageNotFoundError:
        return []
