"""The doctor measures this very machine, remembers what it found, and says what stops llmcad."""

import io
import json
import os
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from llmcad_actors.cli.views import plan_table
from llmcad_actors.doctor.compute import DTYPES, measure_compute, median_seconds
from llmcad_actors.doctor.disk import MIB, Effort, best_of, measure_disk, parts_of, probe_file
from llmcad_actors.doctor.examine import (
    OK,
    PROBLEM,
    WARNING,
    Report,
    check_load,
    check_memory,
    check_store,
    check_versions,
    store_needs,
)
from llmcad_actors.doctor.views import tables
from llmcad_actors.errors import DeadlineError, RuntimeFailure, StorageError
from llmcad_actors.machine.child import run_module
from llmcad_actors.machine.figures import (
    ComputeFigures,
    DiskFigures,
    DiskRate,
    Figures,
    cpu_name,
    device_of,
    figures_file,
    figures_for,
    remember,
)
from llmcad_actors.machine.limits import MemoryLimit
from llmcad_actors.machine.load import LoadWatch, Taken
from llmcad_actors.machine.orphans import Orphans, find_orphans
from llmcad_actors.plan.prediction import forecast
from llmcad_actors.plan.prepare import prepare
from llmcad_actors.storage.checkpoint import Checkpoint
from tests.actors.engines import job
from tests.tiny import tiny_llama

DISK = DiskFigures(2e9, 2, 4 * MIB, True, (DiskRate(1, MIB, 1e9), DiskRate(2, 4 * MIB, 2.1e9)))
FLOPS = {"bfloat16": {1: 1e9, 16: 8e9, 64: 16e9}, "float32": {1: 5e8}}
LAYER_FLOPS = {"bfloat16": {1: 5e8, 16: 4e9, 64: 8e9}, "float32": {1: 2e8}}
COMPUTE = ComputeFigures(2, (100, 50), FLOPS, 1e10, LAYER_FLOPS)
BRIEF = Effort(file_bytes=64 * MIB, rounds=2, sustained_s=0.0)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMCAD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_figures_are_found_again_for_any_path_on_the_device(cache: Path, tmp_path: Path) -> None:
    assert figures_for(tmp_path) is None
    remember(tmp_path, DISK, None)
    assert figures_for(tmp_path) is None  # half of what a prediction needs
    file = remember(tmp_path, None, COMPUTE)
    assert file == figures_file() == cache / "doctor.json"
    assert figures_for(tmp_path) == figures_for(file) == Figures(DISK, COMPUTE)
    assert list(cache.iterdir()) == [file]


def test_figures_of_other_disks_and_cores_are_kept_apart(cache: Path, tmp_path: Path) -> None:
    remember(tmp_path, DISK, COMPUTE)
    stored = json.loads(figures_file().read_text())
    assert (list(stored["disks"]), list(stored["cpus"])) == ([device_of(tmp_path)], [cpu_name()])
    stored["disks"] = {"999:1": stored["disks"].popitem()[1]}
    stored["cpus"]["another, 64 cores"] = {"anything": 1}
    figures_file().write_text(json.dumps(stored))
    assert figures_for(tmp_path) is None
    remember(tmp_path, DISK, COMPUTE)
    assert figures_for(tmp_path) == Figures(DISK, COMPUTE)
    stored = json.loads(figures_file().read_text())
    assert stored["disks"].keys() == {"999:1", device_of(tmp_path)}
    assert stored["cpus"].keys() == {"another, 64 cores", cpu_name()}


@pytest.mark.parametrize("text", ["", "[]", "{", '{"version": 99}', '{"version": 1, "disks": [], "cpus": {}}'])
def test_a_damaged_file_of_figures_is_measured_again(cache: Path, tmp_path: Path, text: str) -> None:
    cache.mkdir()
    figures_file().write_text(text)
    assert figures_for(tmp_path) is None
    remember(tmp_path, DISK, COMPUTE)
    assert figures_for(tmp_path) == Figures(DISK, COMPUTE)


def test_times_between_measured_rows_are_on_a_line() -> None:
    for rows, rate in FLOPS["bfloat16"].items():
        assert COMPUTE.product_seconds(rows, "bfloat16") == pytest.approx(2 * rows * 100 * 50 / rate)
        assert COMPUTE.pass_seconds(rows, "bfloat16", 5000) == pytest.approx(2 * rows * 5000 / (rate / 2))  # of layers
    times = [COMPUTE.pass_seconds(rows, "bfloat16", 10**6) for rows in range(1, 200)]
    assert times == sorted(times)
    assert times[39] == pytest.approx((times[15] + times[63]) / 2)  # 40 rows lie midway between 16 and 64
    assert times[127] == pytest.approx(2 * times[63])
    assert COMPUTE.pass_seconds(8, "float32", 7) == pytest.approx(8 * COMPUTE.pass_seconds(1, "float32", 7))


def test_the_disk_is_read_in_every_setting(tmp_path: Path) -> None:
    shares: list[float] = []
    with probe_file(tmp_path, BRIEF) as file:
        parts = parts_of([file])
        figures = measure_disk(parts, BRIEF, shares.append)
    assert [(rate.threads, rate.chunk_bytes >> 20) for rate in figures.rates] == [
        (threads, chunk) for threads in (1, 2, 4) for chunk in (1, 4, 8, 16)
    ]
    assert all(rate.bytes_per_s > 0 for rate in figures.rates)
    assert (figures.threads, figures.chunk_bytes) in {(rate.threads, rate.chunk_bytes) for rate in figures.rates}
    assert figures.bytes_per_s > 0
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_a_slow_disk_is_given_up_on_in_time(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(MIB))
    hours = count(step=3600)
    figures = measure_disk(parts_of([file]), BRIEF, clock=lambda: float(next(hours)))
    assert len(figures.rates) == 1
    assert 0 < figures.bytes_per_s < MIB


def test_the_probe_does_not_compress_and_leaves_nothing(tmp_path: Path) -> None:
    with probe_file(tmp_path, BRIEF) as file:
        assert file.stat().st_size == BRIEF.file_bytes
        with file.open("rb") as opened:
            start = opened.read(MIB)
            opened.seek(32 * MIB)
            middle = opened.read(MIB)
    assert len(zlib.compress(start + middle)) > 2 * MIB
    assert start != middle
    assert not list(tmp_path.iterdir())


def test_a_folder_without_room_is_refused() -> None:
    with (
        pytest.raises(StorageError, match=r"/proc.*(room for a test file|cannot write).*--path"),
        probe_file(Path("/proc"), BRIEF),
    ):
        pass


def test_parts_cover_the_files_and_short_ones_are_left_out_where_there_are_whole_ones(tmp_path: Path) -> None:
    large, small = tmp_path / "large", tmp_path / "small"
    large.write_bytes(bytes(250))
    small.write_bytes(bytes(30))
    assert [(p.file.name, p.offset, p.nbytes) for p in parts_of([large, small], 100)] == [
        ("large", 0, 100),
        ("large", 100, 100),
    ]
    assert [(p.offset, p.nbytes) for p in parts_of([small], 100)] == [(0, 30)]
    with pytest.raises(StorageError, match="no bytes to read"):
        parts_of([])


def test_fewer_threads_win_when_they_are_nearly_as_fast() -> None:
    rates = [DiskRate(1, MIB, 50.0), DiskRate(1, 8 * MIB, 96.0), DiskRate(2, MIB, 97.0), DiskRate(4, MIB, 100.0)]
    assert best_of(rates) == rates[1]
    assert best_of([*rates, DiskRate(4, 4 * MIB, 200.0)]).bytes_per_s == 200.0


def test_every_product_and_layer_is_measured() -> None:
    layer = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    figures = measure_compute(rows=(1, 5), matrix=(96, 32), layer=layer, seconds=0.0)
    for flops in (figures.matmul_flops, figures.layer_flops):
        assert flops.keys() == set(DTYPES)
        assert all(set(rates) == {1, 5} and min(rates.values()) > 0 for rates in flops.values())
    assert figures.copy_bytes_per_s > 0
    assert ComputeFigures.of(json.loads(json.dumps({**vars_of(figures)}))) == figures


def vars_of(figures: ComputeFigures) -> dict[str, object]:
    return {name: getattr(figures, name) for name in figures.__slots__}


def test_the_first_run_only_warms_up() -> None:
    runs: list[int] = []
    median_seconds(runs.append, 0.0)
    assert runs == [0, 1, 2, 3]


PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(sys.argv[1], "w").write(str(child.pid))
time.sleep(600)
"""


def test_a_child_that_hangs_is_ended_with_what_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hangs.py").write_text(PARENT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(DeadlineError, match="hangs did not end within 3 s"):
        run_module("hangs", [str(tmp_path / "pid")], timeout_s=3.0)
    grandchild, until = int((tmp_path / "pid").read_text()), time.monotonic() + 20
    while runs(grandchild):
        assert time.monotonic() < until
        time.sleep(0.05)


def runs(pid: int) -> bool:
    """A killed process may still be there for a moment, and for longer as a zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_child_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fails.py").write_text("import sys; sys.exit('no luck today')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RuntimeFailure, match=r"exit code 1: no luck today"):
        run_module("fails", timeout_s=60.0)


@contextmanager
def process(*words: str) -> Iterator[subprocess.Popen[bytes]]:
    """A sleeping process with these words on its command line."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", *words]) as running:
        try:
            yield running
        finally:
            running.kill()


def gone_pid() -> int:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


def session(folder: Path, pid: int) -> Path:
    made = folder / f"session_2026-01-01_00-00-00_123456_{pid}"
    made.mkdir(parents=True)
    return made


def test_what_a_dead_driver_left_is_found_and_the_command_removes_it(tmp_path: Path) -> None:
    shared = tmp_path / "shm"
    shared.mkdir()
    (shared / "plasmaAbCdEf").write_bytes(b"x")
    dead = session(tmp_path / "llmcad-dead", gone_pid())
    with process(f"--log_dir={dead}/logs") as daemon:
        found = find_orphans(tmp_path, shared)
        assert daemon.pid in found.pids
        assert found.folders == ()  # still in use
        assert found.shared_files == (shared / "plasmaAbCdEf",)
        subprocess.run(["sh", "-c", Orphans((daemon.pid,), (), found.shared_files).command()], check=True)
        assert daemon.wait(10) == -9
    found = find_orphans(tmp_path, shared)
    assert (found.folders, found.shared_files) == ((tmp_path / "llmcad-dead",), ())
    subprocess.run(["sh", "-c", Orphans((), found.folders).command()], check=True)
    assert not dead.exists()
    assert not find_orphans(tmp_path, shared).folders


def test_a_living_session_is_nobodys_orphan(tmp_path: Path) -> None:
    shared = tmp_path / "shm"
    shared.mkdir()
    living = session(tmp_path / "llmcad-living", os.getpid())
    (tmp_path / "llmcad-being-made").mkdir()
    with process(f"--log_dir={living}/logs") as daemon, (shared / "plasma-open").open("wb"):
        found = find_orphans(tmp_path, shared)
        assert daemon.pid not in found.pids
    assert (found.folders, found.shared_files) == ((), ())
    assert not find_orphans(tmp_path, shared).folders


def test_a_cluster_started_by_hand_is_left_alone(tmp_path: Path) -> None:
    theirs = session(tmp_path / "ray", gone_pid())
    with process(f"--log_dir={theirs}/logs") as daemon:
        assert daemon.pid not in find_orphans(tmp_path, tmp_path).pids


def stat_of(cores: set[int], ticks: int) -> str:
    """/proc/stat of a machine whose cores have each computed so long: half in programs, half in the kernel."""
    cpus = "".join(f"cpu{core} {ticks // 2} 0 {ticks - ticks // 2} 99 9 0 0 0 0 0\n" for core in sorted(cores))
    return f"cpu  1 2 3 4 5 6 7 8 0 0\n{cpus}cpu4095 999999 999999 0 0 0 0 0 0 0 0\nintr 5 5\n"


def test_the_load_is_what_others_compute_on_the_usable_cores(tmp_path: Path) -> None:
    """Both watches look for an hour, in which each core computes for an hour."""
    cores, tick, hours = os.sched_getaffinity(0), os.sysconf("SC_CLK_TCK"), iter((0.0, 0.0, 3600.0, 3600.0))

    def watch(**options: bool) -> LoadWatch:
        return LoadWatch(proc=tmp_path, clock=lambda: next(hours), **options)

    (tmp_path / "stat").write_text(stat_of(cores, 0))
    watches = (watch(), watch(reads_disk=True))
    (tmp_path / "stat").write_text(stat_of(cores, 3600 * tick))
    cpu, disk = (each.taken() for each in watches)
    assert cpu.cores == len(cores)
    assert cpu.is_busy and disk.is_busy
    assert cpu.busy_cores is not None and disk.busy_cores is not None
    assert cpu.busy_cores == pytest.approx(len(cores), rel=0.05)
    assert disk.busy_cores == pytest.approx(len(cores) / 2, rel=0.05)  # the kernel's part may be our own reading
    assert LoadWatch(proc=tmp_path).taken().busy_cores == 0
    assert LoadWatch(proc=tmp_path / "absent").taken().busy_cores is None


SPINNER = "import time\nend = time.monotonic() + 60\nwhile time.monotonic() < end: pass"


def test_another_programs_computing_is_seen_and_our_own_is_not() -> None:
    with subprocess.Popen([sys.executable, "-c", SPINNER]) as other:
        watch = LoadWatch()
        while sum(psutil.Process(other.pid).cpu_times()[:2]) < 0.5:
            time.sleep(0.02)
        seen = watch.taken().busy_cores
        other.kill()
    assert seen is not None and seen > 0
    counted = LoadWatch()._own_s()
    half_a_second = SPINNER.replace("monotonic", "process_time").replace("60", "0.5")
    subprocess.run([sys.executable, "-c", half_a_second], check=True)
    assert LoadWatch()._own_s() - counted >= 0.2  # a child that was waited for is our own


QUIET = Taken("2026-11-20T10:00:00+00:00", 0.02, 2)
BUSY = Taken("2026-11-25T10:00:00+00:00", 1.4, 2)


def report_of(path: Path, disk: DiskFigures, taken: Taken) -> Report:
    return Report(path, disk=disk, compute=COMPUTE, disk_taken=taken, compute_taken=taken)


def test_a_busy_machines_figures_do_not_replace_a_quiet_ones_unless_asked(cache: Path, tmp_path: Path) -> None:
    slow = replace(DISK, bytes_per_s=1e8)
    check_load(report_of(tmp_path, DISK, QUIET), replace=False)
    report = report_of(tmp_path, slow, BUSY)
    check_load(report, replace=False)
    verdict, advice = verdict_of(report, "other programs")
    assert verdict == WARNING
    assert (
        "the earlier figures of the disk, of 2026-11-20, and of the cores, of 2026-11-20, are better and stay" in advice
    )
    assert "llmcad doctor --replace" in advice
    assert (kept(tmp_path).disk, str(kept(tmp_path))) == (DISK, "of 2026-11-20, quiet machine")
    check_load(report_of(tmp_path, slow, BUSY), replace=True)
    assert (kept(tmp_path).disk, str(kept(tmp_path))) == (
        slow,
        "of 2026-11-25, other programs used 1.4 of 2 cores",
    )
    check_load(report_of(tmp_path, DISK, BUSY), replace=False)  # a busy one's are replaced by any
    assert kept(tmp_path).disk == DISK
    quiet = report_of(tmp_path, slow, QUIET)
    check_load(quiet, replace=False)
    assert (kept(tmp_path).disk, verdict_of(quiet, "other programs")) == (slow, (OK, ""))


def kept(path: Path) -> Figures:
    found = figures_for(path)
    assert found is not None
    return found


def test_only_what_was_measured_beside_others_stays_out(cache: Path, tmp_path: Path) -> None:
    check_load(report_of(tmp_path, DISK, QUIET), replace=False)
    later = replace(QUIET, at="2026-11-26T10:00:00+00:00")
    mixed = replace_in(report_of(tmp_path, replace(DISK, threads=4), later), compute_taken=BUSY)
    check_load(mixed, replace=False)
    assert kept(tmp_path).disk.threads == 4
    assert str(kept(tmp_path)) == "(disk: 2026-11-26, quiet machine; cores: 2026-11-20, quiet machine)"
    assert "of the cores, of 2026-11-20, are better" in verdict_of(mixed, "other programs")[1]


def replace_in(report: Report, **changes: Taken) -> Report:
    for name, value in changes.items():
        setattr(report, name, value)
    return report


def test_figures_without_a_load_are_read_and_not_lost_to_busy_ones(cache: Path, tmp_path: Path) -> None:
    """As earlier versions stored them."""
    remember(tmp_path, DISK, COMPUTE)
    stored = json.loads(figures_file().read_text())
    for entry in (*stored["disks"].values(), *stored["cpus"].values()):
        del entry["busy_cores"], entry["usable_cores"]
        entry["measured_at"] = "2026-11-01T00:00:00+00:00"
    figures_file().write_text(json.dumps(stored))
    assert kept(tmp_path) == Figures(DISK, COMPUTE)
    assert str(kept(tmp_path)) == "of 2026-11-01, load unknown"
    check_load(report_of(tmp_path, replace(DISK, threads=4), BUSY), replace=False)
    assert kept(tmp_path).disk == DISK


def test_the_plan_says_when_its_figures_were_taken_and_beside_what(cache: Path, tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model", layers=1)
    remember(model, DISK, replace(COMPUTE, layer_flops={"float32": {1: 1e9}, "bfloat16": {1: 1e9}}), BUSY, QUIET)
    said = forecast(job(model, None))
    assert said["is_measured"]
    assert said["measured"] == (
        "(disk: 2026-11-25, other programs used 1.4 of 2 cores; cores: 2026-11-20, quiet machine)"
    )
    screen = Console(width=200, record=True, file=io.StringIO())
    screen.print(plan_table(job(model, None)))
    assert f"llmcad doctor {said['measured']}" in screen.export_text()


def verdict_of(report: Report, name: str) -> tuple[str, str]:
    (check,) = (check for check in report.checks if check.name == name)
    return check.verdict, check.advice


def test_memory_below_what_the_runtime_takes_is_a_problem(tmp_path: Path) -> None:
    report = Report(tmp_path)
    check_memory(report, MemoryLimit(512 << 20, 16 << 30, "/sys/fs/cgroup/job/memory.max"))
    verdict, advice = verdict_of(report, "memory")
    assert verdict == PROBLEM
    assert advice.endswith("raise the limit in /sys/fs/cgroup/job/memory.max")
    assert not report.is_fit


def test_shared_memory_too_small_for_the_checkpoint_is_a_problem(tmp_path: Path) -> None:
    report = Report(tmp_path)
    check_store(report, 1 << 50)
    verdict, advice = verdict_of(report, "shared memory")
    assert verdict == PROBLEM
    assert "mount -o remount,size=" in advice


def test_the_store_needed_is_the_plans_own(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model", hidden=1536, layers=3)
    assert store_needs(model) == prepare(job(model, None).config).memory.store_bytes > 80 << 20
    assert store_needs(tmp_path) == 80 << 20
    assert Checkpoint.open(model).total_bytes > store_needs(model)


def test_the_versions_installed_are_those_asked_for(tmp_path: Path) -> None:
    report = Report(tmp_path)
    check_versions(report)
    assert verdict_of(report, "versions") == (OK, "")
    for name in ("python 3", "ray 2", "torch 2", "transformers 5", "safetensors"):
        assert name in report.checks[0].found


def llmcad(cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"LLMCAD_CACHE": str(cache), "COLUMNS": "150"}
    command = [sys.executable, "-m", "llmcad_actors.cli", "doctor", "--quick", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)


def test_the_command_checks_a_checkpoint_and_writes_nothing_there(cache: Path, tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model", layers=1)
    before = sorted((file, file.stat().st_mtime_ns) for file in model.iterdir())
    done = llmcad(cache, "--path", str(model), "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    checks = {check["name"]: check for check in report["checks"]}
    assert set(checks) == {
        *("memory", "swap", "shared memory", "versions", "earlier runs", "Ray", "ports"),
        *("direct reads", "disk", "matrix products", "memory copy", "other programs"),
    }
    assert checks["Ray"]["verdict"] == checks["ports"]["verdict"] == OK
    assert checks["disk"]["verdict"] == WARNING  # some hundred KB say little
    assert all(check["advice"] for check in checks.values() if check["verdict"] != OK)
    assert report["kept_in"] == str(figures_file())
    found = figures_for(model)
    assert found is not None
    assert found.disk.bytes_per_s == report["disk"]["bytes_per_s"]
    assert sorted((file, file.stat().st_mtime_ns) for file in model.iterdir()) == before
    whole = Report(model, disk=found.disk, compute=found.compute)
    assert [table.row_count for table in tables(whole)] == [0, 4, 3]


def test_a_problem_makes_the_exit_code_1(tmp_path: Path) -> None:
    done = llmcad(Path("/proc/no/such/cache"))
    assert done.returncode == 1, done.stderr
    assert "problem" in done.stdout
    assert "set LLMCAD_CACHE" in done.stdout
    assert "Traceback" not in done.stderr


def test_a_path_that_is_no_folder_is_refused(cache: Path, tmp_path: Path) -> None:
    done = llmcad(cache, "--path", str(tmp_path / "absent"))
    assert (done.returncode, done.stdout) == (2, "")
    assert "absent is not a folder" in done.stderr
