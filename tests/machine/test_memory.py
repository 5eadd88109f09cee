"""The watcher sees what the process tree really uses."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from llmcad_actors.machine.memory import MemoryWatcher, by_group, by_process, measure, process_pss

MIB = 1 << 20
HOLD = "import sys; held = b'x' * ({} << 20); print('holding', flush=True); sys.stdin.read()"

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")


@contextmanager
def child(megabytes: int) -> Iterator[int]:
    """A process that holds so much memory."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD.format(megabytes)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "holding\n"
        yield process.pid
        assert process.stdin is not None
        process.stdin.close()


def test_a_childs_memory_counts_and_the_peak_outlives_it() -> None:
    watcher = MemoryWatcher(os.getpid())
    before = watcher.sample()
    with child(64):
        during = watcher.sample()
    after = watcher.sample()
    assert during - before > 64 * MIB
    assert during - after > 64 * MIB
    assert watcher.peak_bytes == during
    assert watcher.current_bytes == after


def test_the_watching_thread_samples_by_itself_and_ends() -> None:
    watcher = MemoryWatcher(os.getpid(), interval_s=0.001)
    watcher.start()
    while not watcher.peak_bytes:
        os.sched_yield()
    watcher.close()
    assert watcher.spilled_bytes == 0


def test_what_the_caller_used_before_is_not_counted() -> None:
    baseline = process_pss(os.getpid())[0]
    watcher = MemoryWatcher(os.getpid(), baseline_bytes=baseline)
    assert watcher.sample() < baseline / 2
    huge = MemoryWatcher(os.getpid(), baseline_bytes=1 << 60)
    assert huge.sample() == 0


def test_the_object_store_counts_once_and_what_fell_back_to_disk_is_told_apart(tmp_path: Path) -> None:
    me = psutil.Process()
    before = measure(me)
    with (
        tempfile.NamedTemporaryFile(dir="/dev/shm", prefix="plasma-test-") as store,
        tempfile.NamedTemporaryFile(dir=tmp_path, prefix="plasma-test-") as fallback,
    ):
        for file in (store, fallback):
            file.write(b"x" * 8 * MIB)
            file.flush()
            os.fsync(file.fileno())
        during = measure(me)
    assert 8 * MIB <= during.shared < before.shared + 10 * MIB
    assert during.spilled >= 8 * MIB
    assert before.spilled == 0


def test_a_process_that_is_gone_uses_nothing() -> None:
    with child(1) as pid:
        assert process_pss(pid)[0] > MIB
    assert process_pss(pid) == (0, 0)


def test_use_is_told_by_process() -> None:
    with child(64):
        use = by_process(psutil.Process())
    assert sum(use.values()) > 64 * MIB
    assert max(use.values()) > 64 * MIB


def test_use_is_told_by_group_and_nothing_is_lost() -> None:
    me = psutil.Process()
    before = by_group(me)
    with child(64), tempfile.NamedTemporaryFile(dir="/dev/shm", prefix="plasma-test-") as store:
        store.write(b"x" * 8 * MIB)
        store.flush()
        during, use = by_group(me), measure(me)
    assert during["Ray daemons"] - before["Ray daemons"] > 64 * MIB  # whatever is no actor of ours
    assert during["store"] >= 8 * MIB > before["store"]
    assert during["driver"] < before["driver"] + 32 * MIB
    assert during["verifier"] == 0
    assert sum(during.values()) == pytest.approx(use.total, rel=0.05)
