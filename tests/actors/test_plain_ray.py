"""An engine on Ray as it comes: the same text, the same end, within its plan, and without what knows Ray's insides."""

import os
import signal
import subprocess
import sys

import psutil
import pytest
import ray

from llmcad_actors import Engine
from llmcad_actors.actors import own_ray
from llmcad_actors.errors import ActorFailure, RuntimeFailure
from llmcad_actors.machine.memory import by_group
from llmcad_actors.plan.footprint import DAEMONS, PLAIN_DAEMONS, overhead_bytes
from llmcad_actors.tools.bundled import bundled_draft, bundled_target
from tests.actors.engines import MB, job, processes_of
from tests.plain import Plain, encode

PROMPT, COUNT, SOON_S = "def area(r):\n", 12, 30.0
EXTRA = 10 * MB  # pins some of the bundled target, and not all

BROKEN = """
import sys
from importlib.abc import MetaPathFinder
import psutil

class Broken(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "llmcad_actors.actors.lean_ray":
            raise ImportError("cannot import name 'Node'")

sys.meta_path.insert(0, Broken())
from llmcad_actors import Engine, RuntimeFailure
target, memory = sys.argv[1:]
try:
    Engine.launch(target, memory=memory)
except RuntimeFailure as error:
    print(error)
with Engine.launch(target, memory=memory, plain_ray=True) as engine:
    print(engine.generate("def f(", max_new_tokens=3).token_ids)
left = psutil.wait_procs(psutil.Process().children(recursive=True), 30)[1]
print([process.name() for process in left])
"""


@pytest.fixture(scope="module")
def expected() -> tuple[int, ...]:
    return Plain.of(bundled_target()).greedy(encode(bundled_target(), PROMPT), COUNT)


def left_behind() -> list[psutil.Process]:
    """What still runs below this process, a little while after an end."""
    return psutil.wait_procs(psutil.Process().children(recursive=True), SOON_S)[1]


def test_it_generates_the_same_text_within_its_plan_and_a_killed_actor_is_said_and_leaves_nothing(
    expected: tuple[int, ...],
) -> None:
    prepared = job(bundled_target(), bundled_draft(), extra_bytes=EXTRA, dtype="float32", plain_ray=True)
    handler = signal.getsignal(signal.SIGTERM)
    with Engine.start(prepared) as engine:
        assert signal.getsignal(signal.SIGTERM) == handler
        result = engine.generate(PROMPT, max_new_tokens=COUNT)
        assert result.token_ids == expected
        assert result.stats.bytes_read > 0  # some shards came over the lease socket
        assert 0 < result.stats.peak_memory_bytes <= result.stats.memory_cap_bytes
        assert DAEMONS < by_group(psutil.Process())["Ray daemons"] <= PLAIN_DAEMONS
        (actor,) = processes_of("VerifierActor")
        os.kill(actor.pid, signal.SIGKILL)
        with pytest.raises(ActorFailure, match="died"):
            engine.generate(PROMPT, max_new_tokens=COUNT)
    assert not ray.is_initialized()
    assert not left_behind()


def test_the_plan_counts_its_daemons() -> None:
    for models in (1, 2):
        assert overhead_bytes(models, plain_ray=True) - overhead_bytes(models) == PLAIN_DAEMONS - DAEMONS
    lean, plain = (job(bundled_target(), None, plain_ray=is_plain).memory for is_plain in (False, True))
    assert plain.cap_bytes - lean.cap_bytes == PLAIN_DAEMONS - DAEMONS


def test_a_ray_that_runs_already_is_used_and_left() -> None:
    first = own_ray.start_ray(80 * MB, plain=True)
    own_ray._owned.clear()  # as a caller's own
    guest = own_ray.start_ray(80 * MB, plain=True)
    assert not guest.is_ours
    own_ray.end_ray(guest)
    assert ray.is_initialized()
    first.close()
    assert not ray.is_initialized()


def test_one_that_does_not_start_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    sleeping = [sys.executable, "-c", "import time; time.sleep(600)"]
    daemon, others = [*sleeping, ray.__file__], sleeping
    started: list[subprocess.Popen[bytes]] = []

    def fails(**settings: object) -> None:
        started.extend(map(subprocess.Popen, (daemon, others)))  # another thread may start something meanwhile
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", fails)
    with pytest.raises(RuntimeFailure, match=r"Ray did not start: The current node timed out(?s:.*)llmcad doctor"):
        own_ray.start_ray(80 * MB, plain=True)
    assert started[0].poll() is not None
    assert started[1].poll() is None
    started[1].kill()
    started[1].wait()
    assert not own_ray._owned


def test_it_runs_and_ends_where_rays_insides_are_others_and_without_it_the_error_names_it() -> None:
    """In a process whose Ray lacks what the lean one imports."""
    memory = job(bundled_target(), None, plain_ray=True, extra_bytes=EXTRA).memory.cap_bytes
    done = subprocess.run(
        [sys.executable, "-c", BROKEN, str(bundled_target()), str(memory)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": ":".join(sys.path)},
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    said, ids, left = done.stdout.splitlines()
    assert "cannot import name 'Node'; try --plain-ray" in said
    assert ids.count(",") == 2
    assert left == "[]"
