"""Ray runs with stand-ins for its agents, and never needs the real ones."""

import gc
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray._private import services

from llmcad_actors.actors import idle_agent
from llmcad_actors.actors.idle_agent import port_files
from llmcad_actors.actors.lean_ray import LocalRay
from llmcad_actors.errors import RuntimeFailure

MB = 1_000_000


def test_a_runtime_environment_around_us_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """The agent that would make it is not there, and the actors would wait for it."""
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"runtime_env": {"env_vars": {"A": "b"}}}')
    monkeypatch.setenv("RAY_RUNTIME_ENV_HOOK", "tests.actors.test_idle_agents.refuse")
    around = LocalRay(store_bytes=80 * MB)
    try:
        assert around.is_ours
        assert not ray.get_runtime_context().runtime_env
        assert ray.get(ray.remote(lambda: "here").remote(), timeout=60) == "here"
    finally:
        around.close()


def refuse(runtime_env: object) -> None:
    raise AssertionError("the hook was called")


def test_the_agents_are_stand_ins_and_end_with_ray() -> None:
    before = set(psutil.Process().children(recursive=True))
    around = LocalRay(store_bytes=80 * MB)
    started = set(psutil.Process().children(recursive=True)) - before
    commands = [process.cmdline() for process in started]
    around.close()
    assert sum(word.endswith("/idle_agent.py") for words in commands for word in words) == 2
    assert not any("Agent" in words[0] for words in commands if words)
    gone, alive = psutil.wait_procs(started, timeout=15)
    assert len(gone) > 3
    assert not alive


def test_ports_go_where_the_raylet_looks() -> None:
    files = port_files([f"{os.sep}agent.py", "--node-id=ab12", "--session-dir=/tmp/s=1", "--head"])
    assert Path("/tmp/s=1/runtime_env_agent_port_ab12") in map(Path, files)
    assert len(files) == len(set(files)) == 4


def test_a_port_file_is_never_seen_empty(tmp_path: Path) -> None:
    """The raylet ends at once when it reads an empty one, so a file must appear whole, whoever else writes it."""
    path = tmp_path / "metrics_agent_port_ab12"
    writer = (
        "import sys; from llmcad_actors.actors.idle_agent import write_whole\nwhile True: write_whole(*sys.argv[1:])"
    )
    agents = [subprocess.Popen([sys.executable, "-c", writer, str(path), "-1"]) for _ in range(2)]
    try:
        end = time.monotonic() + 30
        while not path.exists():
            assert time.monotonic() < end
        assert {path.read_text() for _ in range(5000)} == {"-1"}
    finally:
        for agent in agents:
            agent.kill()
            agent.wait()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Ray forgets its handles of them
def test_a_start_that_fails_ends_its_daemons_and_says_what_the_raylet_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = tmp_path / "agent.py"
    source = Path(idle_agent.__file__).read_text()
    agent.write_text(source.replace("write_whole(path, NOBODY)", "write_whole(path, '')"))
    assert agent.read_text() != source
    monkeypatch.setattr(idle_agent, "__file__", str(agent))
    monkeypatch.setattr(services, "get_node", unless_the_raylet_ended)
    children = set(psutil.Process().children(recursive=True))
    with pytest.raises(RuntimeFailure, match="Invalid port value in file"):
        LocalRay(store_bytes=80 * MB)
    started = set(psutil.Process().children(recursive=True)) - children
    _, alive = psutil.wait_procs(started, timeout=15)  # the raylet's own end a moment after it
    assert not alive
    gc.collect()  # those handles: here, and not in a later test


def unless_the_raylet_ended(*_: object) -> dict[str, object]:
    """Ray's question whether the node is there, which asks for 30 seconds; the raylet ends sooner."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for child in psutil.Process().children():
            if child.name() == "raylet" and child.status() == psutil.STATUS_ZOMBIE:
                raise TimeoutError("the raylet ended")
        time.sleep(0.05)
    raise AssertionError("the raylet lives, with a port file that is empty")


def test_a_ray_that_does_not_start_is_reported_and_leaves_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    folders = []

    def too_late(**settings: Any) -> None:
        folders.append(Path(settings["_temp_dir"]))
        assert folders[0].parent.exists()
        raise Exception("The current node timed out during startup.")  # as Ray raises it

    monkeypatch.setattr(ray, "init", too_late)
    with pytest.raises(RuntimeFailure, match=r"Ray did not start: The current node timed out(?s:.*)llmcad doctor"):
        LocalRay(store_bytes=80 * MB)
    assert len(folders) == 1
    assert not folders[0].parent.exists()
