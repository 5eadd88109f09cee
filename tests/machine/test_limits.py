"""The limit that applies is the least of RAM and what any cgroup on the way up allows."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.cgroups import memory_cgroup
from llmcad_actors.config import EngineConfig
from llmcad_actors.engine import Engine
from llmcad_actors.errors import MemoryCapError, StorageError
from llmcad_actors.machine.limits import (
    FreeMemory,
    SharedMemory,
    cgroup_limits,
    check_shared_memory,
    enlarging,
    free_memory,
    memory_limit,
    ram_bytes,
    shared_memory,
    within,
    within_free,
)
from llmcad_actors.plan.admission import admit
from llmcad_actors.plan.prepare import prepare
from tests.sparse import sparse_checkpoint
from tests.tiny import tiny_llama

GIB = 1 << 30
RAM = 16 * GIB
NO_LIMIT_V1 = "9223372036854771712"
V1_MOUNT = "35 31 0:32 {mounted} {point} rw,relatime - cgroup cgroup rw,memory"
V2_MOUNT = "41 31 0:38 {mounted} {point} rw,relatime - cgroup2 cgroup2 rw,nsdelegate"


class FakeRoot:
    """A file system with the few files that tell of memory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.write("proc/meminfo", f"MemTotal:       {RAM >> 10} kB\nMemFree:  1 kB\n")

    def write(self, path: str, text: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")

    def mount(self, own: str, *lines: str) -> None:
        self.write("proc/self/cgroup", own)
        self.write("proc/self/mountinfo", "\n".join(("23 1 254:0 / / rw - ext4 /dev/vda rw", *lines)))

    def v1(self, own: str = "/", mounted: str = "/", point: str = "/sys/fs/cgroup/memory") -> None:
        self.mount(f"9:name=systemd:/\n4:memory:{own}\n0::/elsewhere", V1_MOUNT.format(mounted=mounted, point=point))

    def v2(self, own: str = "/", mounted: str = "/", point: str = "/sys/fs/cgroup") -> None:
        self.mount(f"0::{own}", V2_MOUNT.format(mounted=mounted, point=point))


@pytest.fixture
def fake(tmp_path: Path) -> FakeRoot:
    return FakeRoot(tmp_path)


def test_without_cgroups_ram_is_the_limit(fake: FakeRoot) -> None:
    limit = memory_limit(fake.root)
    assert (limit.limit_bytes, limit.source, limit.is_cgroup) == (RAM, "RAM", False)
    assert str(limit) == "17.18 GB of RAM"


def test_unlimited_cgroups_change_nothing(fake: FakeRoot) -> None:
    fake.v1("/a")
    fake.write("sys/fs/cgroup/memory/memory.limit_in_bytes", NO_LIMIT_V1)
    fake.write("sys/fs/cgroup/memory/a/memory.limit_in_bytes", NO_LIMIT_V1)
    fake.write("sys/fs/cgroup/memory/a/memory.stat", f"cache 0\nhierarchical_memory_limit {NO_LIMIT_V1}")
    assert memory_limit(fake.root).limit_bytes == RAM
    fake.v2("/b")
    for name in ("memory.max", "memory.high"):
        fake.write(f"sys/fs/cgroup/b/{name}", "max")
    assert memory_limit(fake.root).limit_bytes == RAM


@pytest.mark.parametrize("folder", ["", "a/", "a/b/"])
def test_any_ancestor_of_a_v1_cgroup_may_set_the_limit(fake: FakeRoot, folder: str) -> None:
    fake.v1("/a/b")
    for other in ("", "a/", "a/b/"):
        fake.write(f"sys/fs/cgroup/memory/{other}memory.limit_in_bytes", str(8 * GIB))
    fake.write(f"sys/fs/cgroup/memory/{folder}memory.limit_in_bytes", str(2 * GIB))
    fake.write("sys/fs/cgroup/memory/a/b/memory.stat", f"cache 0\nhierarchical_memory_limit {2 * GIB}")
    limit = memory_limit(fake.root)
    assert limit.limit_bytes == 2 * GIB
    assert limit.source == str(fake.root / f"sys/fs/cgroup/memory/{folder}memory.limit_in_bytes")


def test_a_container_is_told_of_limits_above_what_it_sees(fake: FakeRoot) -> None:
    fake.v1("/docker/0af/job", mounted="/docker/0af")
    fake.write("sys/fs/cgroup/memory/memory.limit_in_bytes", str(4 * GIB))
    fake.write("sys/fs/cgroup/memory/job/memory.limit_in_bytes", str(3 * GIB))
    assert memory_limit(fake.root).limit_bytes == 3 * GIB
    fake.write("sys/fs/cgroup/memory/job/memory.stat", f"hierarchical_memory_limit {GIB}")
    assert memory_limit(fake.root).limit_bytes == GIB


@pytest.mark.parametrize("name", ["memory.max", "memory.high"])
@pytest.mark.parametrize("folder", ["user.slice/", "user.slice/me/", "user.slice/me/job/"])
def test_any_ancestor_of_a_v2_cgroup_may_set_the_limit(fake: FakeRoot, folder: str, name: str) -> None:
    fake.v2("/user.slice/me/job")
    for other in ("user.slice/", "user.slice/me/", "user.slice/me/job/"):
        fake.write(f"sys/fs/cgroup/{other}memory.max", "max")
    fake.write("sys/fs/cgroup/user.slice/other/memory.max", str(GIB))
    fake.write(f"sys/fs/cgroup/{folder}{name}", str(5 * GIB))
    limit = memory_limit(fake.root)
    assert (limit.limit_bytes, limit.source) == (5 * GIB, str(fake.root / "sys/fs/cgroup" / folder / name))
    assert str(limit) == f"5.37 GB, which {limit.source} allows"


def test_a_cgroup_that_cannot_be_seen_leaves_those_that_can(fake: FakeRoot) -> None:
    fake.v2("/../../elsewhere")
    fake.write("sys/fs/cgroup/memory.max", str(6 * GIB))
    assert memory_limit(fake.root).limit_bytes == 6 * GIB
    fake.v1("/elsewhere", mounted="/docker/0af", point="/cgroups/mem")
    fake.write("cgroups/mem/memory.limit_in_bytes", str(7 * GIB))
    assert memory_limit(fake.root).limit_bytes == 7 * GIB


def test_v1_and_v2_side_by_side_both_count(fake: FakeRoot) -> None:
    v1 = V1_MOUNT.format(mounted="/", point="/sys/fs/cgroup/memory")
    fake.mount("4:cpu,memory:/a\n0::/b", v1, V2_MOUNT.format(mounted="/", point="/sys/fs/cgroup/unified"))
    fake.write("sys/fs/cgroup/memory/a/memory.limit_in_bytes", str(3 * GIB))
    fake.write("sys/fs/cgroup/unified/b/memory.max", str(9 * GIB))
    assert sorted(limit for _, limit in cgroup_limits(fake.root)) == [3 * GIB, 9 * GIB]


def test_without_proc_the_error_says_so(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"meminfo does not say how much RAM.*needs Linux"):
        ram_bytes(tmp_path)


def test_a_cap_above_the_limit_is_lowered_and_the_user_told(fake: FakeRoot) -> None:
    fake.v2("/job")
    fake.write("sys/fs/cgroup/job/memory.max", str(2 * GIB))
    limit = memory_limit(fake.root)
    assert within(2 * GIB, limit) == (2 * GIB, ())
    cap, (notice,) = within(3 * GIB, limit)
    assert cap == 2 * GIB
    assert notice == f"the memory cap of 3.22 GB is lowered to 2.15 GB, which {limit.source} allows"


def test_a_share_of_the_memory_is_lowered_to_what_is_free_and_the_user_told() -> None:
    assert within_free(3 * GIB, GIB, FreeMemory(2 * GIB, 4 * GIB)) == (3 * GIB, ())
    cap, (notice,) = within_free(3 * GIB, 2 * GIB, FreeMemory(2 * GIB, 4 * GIB))
    assert cap == 2 * GIB * 15 // 16
    assert notice == "the memory cap of 3.22 GB is lowered to 2.01 GB: no more is free now"


def test_a_model_that_would_take_all_of_the_memory_is_planned_within_what_is_free(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_hidden_layers": 80}
    model = sparse_checkpoint(tmp_path / "70B", "llama", {**sizes, "vocab_size": 32000, "num_key_value_heads": 8})
    job = prepare(EngineConfig(target=str(model), memory="100%"))
    assert job.memory.total_bytes <= job.memory.cap_bytes < memory_limit().limit_bytes
    assert any("no more is free now" in notice for notice in job.notices)
    with pytest.raises(MemoryCapError, match="of memory is free now"):
        admit(prepare(EngineConfig(target=str(model), memory=f"{memory_limit().limit_bytes}B")), folder=tmp_path)


def test_a_job_is_planned_within_the_machine(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model", layers=1)
    limit = memory_limit().limit_bytes
    job = prepare(EngineConfig(target=str(model), memory="1000TB"))
    assert job.memory.cap_bytes == limit
    assert "is lowered to" in job.notices[0]
    assert prepare(EngineConfig(target=str(model), memory="100%")).notices == ()
    half = prepare(EngineConfig(target=str(model), memory="50%"))
    assert half.memory.cap_bytes == limit // 2


def test_in_a_real_cgroup_the_command_plans_within_its_limit(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model", layers=1)
    arguments = [sys.executable, "-m", "llmcad_actors.cli", "plan", "--target", str(model), "--json", "--draft", "none"]
    try:
        with memory_cgroup(2 * GIB) as cgroup:
            of_share, of_more = (
                subprocess.run(
                    cgroup.command([*arguments, "--memory", memory]), capture_output=True, text=True, timeout=120
                )
                for memory in ("75%", "3GiB")
            )
            assert 0 < (cgroup.peak_bytes() or 1) <= 2 * GIB
            assert cgroup.oom_kills() == 0
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here: {error}")
    assert json.loads(of_share.stdout)["memory_cap_bytes"] == 3 * GIB // 2, of_share.stderr
    assert of_share.stderr == ""
    assert json.loads(of_more.stdout)["memory_cap_bytes"] == 2 * GIB, of_more.stderr
    assert "llmcad: the memory cap of 3.22 GB is lowered to 2.15 GB, which /sys/fs/cgroup/" in of_more.stderr


def test_shared_memory_too_small_for_the_store_is_refused_with_the_size_that_works(tmp_path: Path) -> None:
    check_shared_memory(1, tmp_path)
    found = shared_memory(tmp_path)
    with pytest.raises(StorageError, match=r"MiB free.*remount,size=\d+M .*--shm-size=\d+m.*smaller --memory"):
        check_shared_memory(found.total_bytes + (1 << 40), tmp_path)
    half_full = SharedMemory(Path("/dev/shm"), total_bytes=64 << 20, free_bytes=32 << 20)
    assert enlarging(half_full, 100 << 20) == (  # what is used, what is needed, and 64 MiB to spare
        "enlarge it (mount -o remount,size=196M /dev/shm; in Docker --shm-size=196m)"
    )


def test_shared_memory_that_is_absent_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"absent cannot be used.*No such file.*mount -t tmpfs"):
        check_shared_memory(1, tmp_path / "absent")


def test_the_engine_hands_notices_on_before_it_starts_anything(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    said: list[str] = []

    def say(what: str) -> None:
        said.append(what)
        if what == "starting Ray":
            raise Stop

    with pytest.raises(Stop):
        Engine.launch(tiny_llama(tmp_path / "model", layers=1), memory="1000TB", say=say)
    assert "the memory cap of" in said[0]


def free_bytes(fake: FakeRoot) -> tuple[int, int]:
    found = free_memory(fake.root)
    return found.free_bytes, found.limit_bytes


def test_what_is_free_is_what_the_kernel_says_is_available(fake: FakeRoot) -> None:
    fake.write("proc/meminfo", f"MemTotal: {RAM >> 10} kB\nMemFree: 1 kB\nMemAvailable: {3 * GIB >> 10} kB")
    assert free_bytes(fake) == (3 * GIB, RAM)


def test_in_a_cgroup_the_page_cache_counts_as_free_and_the_shortest_ancestor_binds(fake: FakeRoot) -> None:
    fake.write("proc/meminfo", f"MemTotal: {RAM >> 10} kB\nMemAvailable: {12 * GIB >> 10} kB")
    fake.v2("/a/b")
    below, above = "sys/fs/cgroup/a/b", "sys/fs/cgroup/a"
    for folder, limit, used in ((below, 4 * GIB, 1 * GIB), (above, 6 * GIB, 5 * GIB)):
        fake.write(f"{folder}/memory.max", str(limit))
        fake.write(f"{folder}/memory.high", "max")
        fake.write(f"{folder}/memory.current", str(used))
    assert free_bytes(fake) == (1 * GIB, 6 * GIB)
    fake.write(f"{above}/memory.stat", f"anon 5\ninactive_file {GIB}\nactive_file {2 * GIB}\nshmem 7")
    assert free_bytes(fake) == (3 * GIB, 4 * GIB)


def test_a_cgroup_of_version_1_tells_what_is_free(fake: FakeRoot) -> None:
    fake.write("proc/meminfo", f"MemTotal: {RAM >> 10} kB\nMemAvailable: {12 * GIB >> 10} kB")
    fake.v1("/a")
    fake.write("sys/fs/cgroup/memory/a/memory.limit_in_bytes", str(4 * GIB))
    fake.write("sys/fs/cgroup/memory/a/memory.usage_in_bytes", str(3 * GIB))
    fake.write("sys/fs/cgroup/memory/a/memory.stat", f"inactive_file 9\ntotal_inactive_file {GIB}\ntotal_active_file 0")
    assert free_bytes(fake) == (2 * GIB, 4 * GIB)
