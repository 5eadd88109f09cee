"""Ray on one machine: start it lean, wrap the actor classes once, end everything that was started."""

import logging
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants, services
from ray._private.node import Node

from llmcad_actors.actors import idle_agent
from llmcad_actors.actors.calls import fetch
from llmcad_actors.actors.coordinator import Coordinator
from llmcad_actors.actors.draft import DraftActor
from llmcad_actors.actors.loader import LoaderActor
from llmcad_actors.actors.verifier import VerifierActor
from llmcad_actors.config import DraftSpec, LoaderSpec, VerifierSpec
from llmcad_actors.core.costs import CostModel
from llmcad_actors.core.fallback import Policy
from llmcad_actors.errors import RuntimeFailure
from llmcad_actors.limits import check_shared_memory
from llmcad_actors.messages import pack

START_TIMEOUT_S = 180.0
PIN_TIMEOUT_S = 3600.0
NUM_ACTORS = 4

ENVIRONMENT: dict[str, str | None] = {
    "RAY_JOB_CONFIG_JSON_ENV_VAR": None,  # of a job of another Ray around us, with a runtime environment
    "RAY_worker_niceness": "0",  # at Ray's default, 15, a drafting process slows a pass to half
    "RAY_memory_monitor_refresh_ms": "0",  # a nearly full machine is normal here: the byte budget rules
    "RAY_usage_stats_enabled": "0",
    "RAY_free_objects_period_milliseconds": "0",  # what is dropped is needed at once
    "RAY_enable_metrics_collection": "0",
    "RAY_enable_pipe_based_agent_to_parent_health_check": "1",  # an idle agent ends when its standard input does
    "RAY_start_python_gc_manager_thread": "0",  # it collects garbage for 0.2 s whenever the store is well used
    "TRANSFORMERS_SDPA_FORCE_GQA": "1",  # grouped heads without copying keys and values: half the attention time
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "8388608",
    "MALLOC_TRIM_THRESHOLD_": "16777216",
    "PYTHONWARNINGS": "ignore",
}
IDLE_AGENTS = ("dashboard_agent", "runtime_env_agent")  # the raylet ends without them; nobody here calls them
SPARE_DAEMONS = ("kill_monitor", "kill_dashboard", "kill_log_monitor")  # 150 MB that one machine has no use for


@contextmanager
def environment(values: Mapping[str, str | None]) -> Iterator[None]:
    """Set environment variables, or unset them, inside the block; children started there keep them."""
    before = {name: os.environ.get(name) for name in values}
    _set(values)
    try:
        yield
    finally:
        _set(before)


def _set(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextmanager
def idle_agents() -> Iterator[None]:
    """Inside the block, Ray starts `idle_agent.py` for the agents that nobody calls."""
    build, asks_uv = (
        services._build_python_executable_command_memory_profileable,
        ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV,
    )

    def command(component: str, *args: Any, **kwargs: Any) -> list[str]:
        if component in IDLE_AGENTS:
            return [sys.executable, "-I", "-S", idle_agent.__file__]
        return list(build(component, *args, **kwargs))

    services._build_python_executable_command_memory_profileable = command
    ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = False  # under `uv run` a runtime environment would be made
    try:
        yield
    finally:
        services._build_python_executable_command_memory_profileable = build
        ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = asks_uv


class LocalRay:
    """A Ray instance of our own on this machine; or the caller's, if one is running, which we then leave alone."""

    def __init__(self, store_bytes: int) -> None:
        self.is_ours = not ray.is_initialized()
        self._folder = ""
        if self.is_ours:
            check_shared_memory(store_bytes)
            for is_last in (False, True):  # on a slow disk Ray's programs may come too late for its deadline
                try:
                    return self._try(store_bytes)
                except Exception as error:
                    if is_last:
                        why = "\n".join(
                            [str(error), *getattr(error, "__notes__", ()), "`llmcad doctor` may tell more."]
                        )
                        raise RuntimeFailure(f"Ray did not start: {why}") from error

    def _try(self, store_bytes: int) -> None:
        """Start; what failed leaves nothing."""
        self._folder = tempfile.mkdtemp(prefix="llmcad-")
        try:
            with environment(ENVIRONMENT), idle_agents():
                self._start(store_bytes)
        except BaseException as error:
            _end_half_started(error)
            for line in _fatal_lines(self._folder):
                error.add_note(line)
            self.close()
            raise

    def _start(self, store_bytes: int) -> None:
        logging.getLogger("ray").setLevel(logging.ERROR)
        ray.init(
            address="local",
            num_cpus=NUM_ACTORS,  # Ray starts as many workers ahead; the actors take exactly these
            object_store_memory=store_bytes,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=self._folder,
            _skip_env_hook=True,  # no runtime environment: nobody listens to make it
            _system_config={"automatic_object_spilling_enabled": False},
        )
        node = ray._private.worker._global_node
        for kill in SPARE_DAEMONS:
            with suppress(Exception):  # another Ray version may have no such daemon
                getattr(node, kill)(check_alive=False)

    def close(self) -> None:
        if self.is_ours:
            ray.shutdown()
            shutil.rmtree(self._folder, ignore_errors=True)


def _end_half_started(error: BaseException) -> None:
    """End the daemons of a node whose making raised `error`: Ray forgets them, and its shutdown does not reach them."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        node = frame.f_locals.get("self")
        if isinstance(node, Node):
            node.kill_all_processes(check_alive=False, wait=True)


def _fatal_lines(folder: str) -> list[str]:
    """What the raylet said as it gave up; Ray's own error does not tell."""
    logs = Path(folder).glob("session_2*/logs/raylet.out")
    lines = [line for log in logs for line in log.read_text(errors="replace").splitlines()]
    return [line.partition("Check failed: ")[2] for line in lines if "Check failed: " in line]


@dataclass
class Actors:
    """Handles of the running actors."""

    loader: Any
    verifier: Any
    draft: Any | None
    coordinator: Any

    def all(self) -> list[Any]:
        return [a for a in (self.coordinator, self.draft, self.verifier, self.loader) if a is not None]

    def close(self) -> None:
        for actor in self.all():
            with suppress(Exception):  # already dead is what we want
                ray.kill(actor)


def start_actors(
    loader: LoaderSpec,
    verifier: VerifierSpec,
    draft: DraftSpec | None,
    policy: Policy,
    costs: CostModel,
    say: Callable[[str], None],
) -> Actors:
    """Start the actors and pin what is to stay; returns when all are ready. Raises what an actor raised.

    `say` is told what is being waited for.
    """
    load = _remote(LoaderActor).remote(pack(loader))
    verify = _remote(VerifierActor).remote(pack(verifier), load)
    drafting = _remote(DraftActor).remote(pack(draft)) if draft is not None else None
    coordinate = _remote(Coordinator).remote(verify, drafting, pack(policy), pack(costs))
    actors = Actors(load, verify, drafting, coordinate)
    try:
        _await_ready(actors, say)
    except BaseException:
        actors.close()
        raise
    return actors


def _remote(kind: type) -> Any:
    return ray.remote(num_cpus=0, max_restarts=0)(kind)


def _await_ready(actors: Actors, say: Callable[[str], None]) -> None:
    say("starting the loader")
    fetch(actors.loader.start.remote(), START_TIMEOUT_S, "the loader's start")
    say("building the target's skeleton")
    fetch(actors.verifier.ready.remote(), START_TIMEOUT_S, "the verifier's start")
    if actors.draft is not None:
        say("loading the draft")
        fetch(actors.draft.ready.remote(), START_TIMEOUT_S, "the draft's start")
    say("pinning layers")
    fetch(actors.verifier.pin.remote(), PIN_TIMEOUT_S, "pinning layers")
    fetch(actors.coordinator.ready.remote(), START_TIMEOUT_S, "the coordinator's start")
