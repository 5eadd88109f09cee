"""A plan that takes more than is free is refused before anything starts, promises to other engines taken off."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.cgroups import memory_cgroup
from llmcad_actors.config import EngineConfig
from llmcad_actors.core.budget import format_size
from llmcad_actors.errors import MemoryCapError
from llmcad_actors.machine.limits import FreeMemory, ram_bytes
from llmcad_actors.machine.memory import process_pss
from llmcad_actors.plan.admission import Admission, _notes, _write, admit, shortage
from llmcad_actors.plan.footprint import CALLER
from llmcad_actors.plan.job import Prepared
from llmcad_actors.plan.prepare import prepare
from llmcad_actors.tools.bundled import bundled_draft, bundled_target

MB = 10**6

RUNNING = """
import sys
from pathlib import Path
from tests.plan.test_admission import admit, free, job

held = b"x" * int(sys.argv[2])
admission = admit(job(), free(10**12), Path(sys.argv[1]))
print("admitted", flush=True)
sys.stdin.read()
"""


def job(memory: str = "1.2GB") -> Prepared:
    return prepare(EngineConfig(target=str(bundled_target()), draft=str(bundled_draft()), memory=memory))


def free(num_bytes: int, limit_bytes: int | None = None) -> Callable[[], FreeMemory]:
    """What `free_memory` would say; the machine's, unless a cgroup's limit is given."""
    return lambda: FreeMemory(num_bytes, limit_bytes or ram_bytes())


@contextmanager
def engine_elsewhere(notes: Path, held_bytes: int = 0) -> Iterator[subprocess.Popen[str]]:
    """Another process whose engine has been admitted, and which has taken so much so far."""
    with subprocess.Popen(
        [sys.executable, "-c", RUNNING, str(notes), str(held_bytes)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": ":".join(sys.path)},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "admitted\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_plan_that_fits_is_admitted_and_a_larger_one_is_refused(tmp_path: Path) -> None:
    prepared = job()
    needed = prepared.memory.total_bytes
    admit(prepared, free(needed), tmp_path).close()
    with pytest.raises(MemoryCapError) as caught:
        admit(prepared, free(needed - CALLER - MB), tmp_path)
    words = str(caught.value)
    assert f"this run takes {format_size(needed)}, and " in words
    assert "of memory is free now; " in words
    assert "close the other programs first" in words


def test_what_is_advised_would_do(tmp_path: Path) -> None:
    prepared = job("1.2GB")
    room = prepared.least_bytes + 10 * MB - min(process_pss(os.getpid())[0], CALLER)  # this process has that already
    why = shortage(prepared, free(room), tmp_path)
    assert why is not None
    advised = why.partition("give --memory ")[2].split()[0]
    assert shortage(job(advised), free(room), tmp_path) is None
    hopeless = shortage(prepared, free(prepared.least_bytes - CALLER - MB), tmp_path)
    assert hopeless is not None and "it cannot do with less than" in hopeless


def test_a_second_engine_right_after_the_first_does_not_count_the_same_bytes(tmp_path: Path) -> None:
    prepared = job()
    machine = free(prepared.memory.total_bytes * 3 // 2)
    assert shortage(prepared, machine, tmp_path) is None
    with engine_elsewhere(tmp_path) as other:
        with pytest.raises(MemoryCapError, match=rf"other llmcad engines have planned .*process {other.pid} \("):
            admit(prepared, machine, tmp_path)
        other.kill()  # as hard as can be: nothing is tidied up
        other.wait()
        admit(prepared, machine, tmp_path).close()
    assert not list(tmp_path.glob("*.json"))


def test_what_the_first_engine_has_taken_is_not_taken_off_twice(tmp_path: Path) -> None:
    """The machine does not call it free any more."""
    prepared = job()
    taken = 500 * MB
    machine = free(2 * prepared.memory.total_bytes - taken)
    with engine_elsewhere(tmp_path, taken):
        assert shortage(prepared, machine, tmp_path) is None
    with engine_elsewhere(tmp_path):
        assert shortage(prepared, machine, tmp_path) is not None


def test_a_cgroup_of_ones_own_is_not_shared_with_others(tmp_path: Path) -> None:
    """Nor with an engine in another one: what it planned does not come out of this one's limit."""
    prepared = job()
    room = prepared.memory.total_bytes
    with engine_elsewhere(tmp_path):
        (note,) = tmp_path.glob("*.json")
        assert shortage(prepared, free(room, limit_bytes=room), tmp_path) is not None  # the same one
        text = note.read_text()
        with note.open("r+") as file:
            file.write(text.replace('"cgroup": "', '"cgroup": "elsewhere:'))
        assert shortage(prepared, free(room, limit_bytes=room), tmp_path) is None
        assert shortage(prepared, free(room), tmp_path) is not None


def test_an_engine_that_is_being_admitted_is_waited_for(tmp_path: Path) -> None:
    """Both would find enough to be free, and no note of the other."""
    prepared, outcome = job(), list[Admission | MemoryCapError]()
    needed = prepared.memory.total_bytes

    def start() -> None:
        try:
            outcome.append(admit(prepared, free(needed), tmp_path))
        except MemoryCapError as error:
            outcome.append(error)

    later = threading.Thread(target=start)
    with _notes(tmp_path) as notes:
        later.start()
        later.join(1.0)  # it would be through by then
        assert notes is not None and not outcome
        first = _write(notes, needed)
    later.join(60)
    first.close()
    assert [type(each) for each in outcome] == [MemoryCapError]


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_notes_in_another_users_folder_are_not_believed(tmp_path: Path) -> None:
    prepared = job()
    with engine_elsewhere(tmp_path):
        os.chown(tmp_path, 12345, 12345)
        admit(prepared, free(prepared.memory.total_bytes), tmp_path).close()


BESIDE_A_HOG = """
import subprocess, sys
from llmcad_actors.cli.commands import app
from typer.testing import CliRunner

hog = f"import sys; held = b'x' * {sys.argv[1]}; print('eaten', flush=True); sys.stdin.read()"
with subprocess.Popen([sys.executable, "-c", hog], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as eater:
    assert eater.stdout.readline() == "eaten\\n"
    options = ["--target", sys.argv[2], "--draft", "none", "--memory", "1GB"]
    for command in (["plan", *options], ["generate", *options, "x"]):
        done = CliRunner().invoke(app, command)
        print(done.exit_code, done.stderr.replace("\\n", " "))
    eater.stdin.close()
"""


def test_a_run_beside_a_neighbour_in_its_cgroup_is_refused_and_nobody_is_killed() -> None:
    hog = 900 * MB
    try:
        with memory_cgroup(1300 * MB) as cgroup:
            done = subprocess.run(
                cgroup.command([sys.executable, "-c", BESIDE_A_HOG, str(hog), str(bundled_target())]),
                capture_output=True,
                text=True,
                env={**os.environ, "PYTHONPATH": ":".join(sys.path)},
                timeout=120,
            )
            kills = cgroup.oom_kills()
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here: {error}")
    assert done.returncode == 0, done.stderr
    planned, refused = done.stdout.splitlines()
    assert planned.startswith("0 llmcad: it could not be started now: this run takes")
    assert refused.startswith("2 llmcad: this run takes")
    assert "of memory is free now" in refused
    assert kills == 0
