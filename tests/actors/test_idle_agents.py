"""Ray runs with stand-ins for its agents, and never needs the real ones."""

import os
from pathlib import Path

import psutil
import pytest
import ray

from llmcad_actors.actors.idle_agent import port_files
from llmcad_actors.actors.runtime import LocalRay
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


def test_a_ray_that_does_not_start_is_reported_and_leaves_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    folders = []

    def fail(**settings: object) -> None:
        folders.append(Path(str(settings["_temp_dir"])))
        raise Exception("The current node timed out during startup.")  # as Ray raises it

    monkeypatch.setattr(ray, "init", fail)
    with pytest.raises(RuntimeFailure, match=r"Ray did not start: The current node timed out(?s:.*)llmcad doctor"):
        LocalRay(store_bytes=80 * MB)
    assert not folders[0].exists()
