"""The Ray that llmcad starts is for its own run alone, and no call of ours ever starts another one."""

import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from llmcad_actors.actors.calls import Remote, fetch
from llmcad_actors.actors.lean_ray import ENVIRONMENT, LocalRay, _read_environment, have_ended
from llmcad_actors.actors.ray_check import listening
from llmcad_actors.actors.ray_log import VARIABLE
from llmcad_actors.doctor.examine import OK, WARNING, Report, add_ports
from llmcad_actors.errors import ActorFailure, LlmcadError, RuntimeFailure
from tests.actors.test_lifecycle import becomes_true

STORE = 80_000_000
DEADLINE_S = 60.0

CLIENT = """
import sys, ray
ray._private.ray_constants.ENABLE_RAY_CLUSTER = False  # or it would look for it at the machine's other address
ray.init(address=sys.argv[1], log_to_driver=False)
print(ray.get(ray.remote(num_cpus=0)(lambda: "code was run").remote(), timeout=40))
"""


class Actor:
    def token(self) -> str:
        return os.environ["RAY_AUTH_TOKEN"]

    def pid(self) -> int:
        return os.getpid()

    def hang(self) -> None:
        threading.Event().wait()


def remote(local: LocalRay) -> Any:
    return Remote(local.line, ray.remote(num_cpus=0)(Actor).remote())


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="t", ignore_cleanup_errors=True) as name:
        yield Path(name)


@pytest.fixture(scope="module")
def local(folder: Path) -> Iterator[LocalRay]:
    """Started where the environment asks for no authentication, and an earlier run's folder is left."""
    dead = folder / f"llmcad-dead/session_2026-01-01_00-00-00_123456_{gone_pid()}"
    dead.mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(folder))
        patch.setenv("LLMCAD_CACHE", str(folder))
        patch.setenv("RAY_AUTH_MODE", "disabled")
        before = dict(os.environ), signal.getsignal(signal.SIGTERM)
        started = LocalRay(STORE)
        try:
            changed = {name for name, value in os.environ.items() if before[0].get(name) != value}
            assert not changed & {*ENVIRONMENT, "RAY_AUTH_TOKEN", VARIABLE}
            assert signal.getsignal(signal.SIGTERM) == before[1]
            yield started
        finally:
            started.close()
        assert signal.getsignal(signal.SIGTERM) == before[1]
        assert not list(folder.glob("llmcad-*"))


def gone_pid() -> int:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


def test_what_a_dead_driver_left_is_swept_by_the_next_start(local: LocalRay, folder: Path) -> None:
    (mine,) = folder.glob("llmcad-*")
    assert (mine / "ray").exists()


def test_nobody_else_can_look_into_the_session(local: LocalRay, folder: Path) -> None:
    """Ray makes all that is inside writable for everybody."""
    (mine,) = folder.glob("llmcad-*")
    assert stat.S_IMODE(mine.stat().st_mode) == 0o700
    secret = ray.get(ray.remote(num_cpus=0)(lambda: os.environ["RAY_AUTH_TOKEN"]).remote(), timeout=DEADLINE_S)
    files = [file for file in mine.rglob("*") if file.is_file()]
    assert len(files) > 5
    assert not any(secret.encode() in file.read_bytes() for file in files)


def test_it_listens_on_the_loopback_interface_alone(local: LocalRay) -> None:
    found = listening()
    assert len(found) >= 4  # the driver, the control store, the raylet's two
    assert set(found) <= {"127.0.0.1", "::1"}


def test_a_client_without_the_token_is_refused(local: LocalRay, folder: Path) -> None:
    address = ray.get_runtime_context().gcs_address
    token = fetch(remote(local).token.remote(), DEADLINE_S, "the token")
    asks = [
        {"RAY_AUTH_MODE": "disabled"},
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 64},
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token},
    ]
    common = os.environ | {"HOME": str(folder), "RAY_NUM_REDIS_GET_RETRIES": "1"}
    clients = [
        subprocess.Popen(
            [sys.executable, "-c", CLIENT, address],
            env=common | ask,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for ask in asks
    ]
    disabled, wrong, right = (client.communicate(timeout=2 * DEADLINE_S)[0] for client in clients)
    assert "code was run" in right
    for said in (disabled, wrong):
        assert "code was run" not in said
        assert "InvalidAuthToken" in said


def test_a_wait_under_way_ends_with_the_line(local: LocalRay) -> None:
    guest = LocalRay(STORE)
    assert not guest.is_ours
    hanging, heard = remote(guest), list[RuntimeFailure]()

    def wait() -> None:
        with pytest.raises(RuntimeFailure, match="Ray has ended") as caught:
            fetch(call, 10 * DEADLINE_S, "the answer")
        heard.append(caught.value)

    call = hanging.hang.remote()
    waiting = threading.Thread(target=wait)
    waiting.start()
    guest.line.end([hanging])
    waiting.join(DEADLINE_S)
    assert heard
    guest.close()
    assert ray.is_initialized()  # it was another's


def test_an_actor_that_dies_is_a_message_that_names_a_log_and_ray_says_nothing_on_the_screen(
    local: LocalRay, capfd: pytest.CaptureFixture[str]
) -> None:
    actor = remote(local)
    pid = fetch(actor.pid.remote(), DEADLINE_S, "its number")
    call = actor.hang.remote()
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(ActorFailure, match=r"the answer failed: the actor died .* details are in ") as caught:
        fetch(call, DEADLINE_S, "the answer")
    text = Path(str(caught.value).rpartition(" ")[2]).read_text()
    assert "worker process has died" in text
    assert "\x1b" not in text
    assert capfd.readouterr() == ("", "")


def test_no_call_reaches_ray_once_it_has_ended(local: LocalRay) -> None:
    """Ray would start another one, with its own defaults."""
    guest = LocalRay(STORE)
    theirs, mine = remote(guest), remote(local)
    pending = mine.hang.remote(), theirs.hang.remote()
    local.close()
    for line in (guest.line, local.line):
        with pytest.raises(RuntimeFailure), line.inside():
            pass
    for actor, call in zip((mine, theirs), pending, strict=True):
        for use in (actor.token.remote, call.is_done, lambda call=call: fetch(call, 1.0, "it")):
            with pytest.raises(LlmcadError, match="Ray has ended"):
                use()
        actor.line.end([actor])
    guest.close()
    assert not ray.is_initialized()
    assert not psutil.Process().children(recursive=True)


def test_the_callers_own_ray_is_started_as_the_caller_wants_afterwards(
    local: LocalRay, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    """Nothing of our token stays in the process."""
    local.close()
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "e" * 64)
    second = LocalRay(STORE)
    assert fetch(remote(second).token.remote(), DEADLINE_S, "the token") not in ("e" * 64, "")
    second.close()
    handler = signal.getsignal(signal.SIGTERM)
    ray.init(
        address="local", num_cpus=1, object_store_memory=STORE, include_dashboard=False, _temp_dir=str(folder / "r")
    )
    try:
        assert ray.get(ray.remote(Actor).remote().token.remote(), timeout=DEADLINE_S) == "e" * 64
        guest = LocalRay(STORE)
        assert fetch(remote(guest).token.remote(), DEADLINE_S, "the token") == "e" * 64
        guest.close()
        assert ray.is_initialized()
    finally:
        ray.shutdown()
        signal.signal(signal.SIGTERM, handler)
        monkeypatch.undo()
        _read_environment()  # or Ray would ask for this token as long as the process lives


def test_doctor_says_what_listens_and_warns_of_other_interfaces(tmp_path: Path) -> None:
    report = Report(tmp_path)
    add_ports(report, ["127.0.0.1", "127.0.0.1", "::1"])
    add_ports(report, ["127.0.0.1", "::"])
    near, far = report.checks
    assert (near.verdict, far.verdict) == (OK, WARNING)
    assert "3 TCP ports" in near.found
    assert "firewall" in far.advice


def test_a_process_whose_end_nobody_asks_about_has_ended() -> None:
    """As where the first process of a container is no `init`."""
    parent = (
        "import subprocess, time; child = subprocess.Popen(['true']); print(child.pid, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            child = psutil.Process(int(process.stdout.readline()))
            assert becomes_true(lambda: child.status() == psutil.STATUS_ZOMBIE)
            assert have_ended([child], 30.0)
            assert not have_ended([psutil.Process(process.pid)], 0.1)
        finally:
            process.kill()
