"""Ray on one machine, bent to our needs: lean, silent, for this machine and this run alone, and gone in the end.

Lean: stand-ins for agents that nobody calls, no daemons that one machine has no use for, settings of speed. For this
run alone: it listens on the loopback interface, and every call needs a token that only its own processes have. Gone:
processes that do not end in time are killed, and the folder is removed.
"""

import atexit
import ctypes
import logging
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import ray
from ray._private import ray_constants, services
from ray._private.node import Node
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

from llmcad_actors.actors import idle_agent
from llmcad_actors.actors.calls import Line
from llmcad_actors.actors.environment import OF_ACTORS, environment
from llmcad_actors.actors.ray_log import VARIABLE, RayLog, logging_to
from llmcad_actors.errors import RuntimeFailure
from llmcad_actors.machine.limits import check_shared_memory
from llmcad_actors.machine.sessions import SessionFolder, log_folder, sweep

NUM_ACTORS = 4
END_TIMEOUT_S = 5.0
ADVICE = "`llmcad doctor` may tell more; --plain-ray starts Ray without the changes that llmcad makes to it."

ENVIRONMENT: dict[str, str | None] = OF_ACTORS | {
    "RAY_JOB_CONFIG_JSON_ENV_VAR": None,  # of a job of another Ray around us, with a runtime environment
    "RAY_REDIS_ADDRESS": None,  # another Ray's state is not for ours
    "RAY_worker_niceness": "0",  # at Ray's default, 15, a drafting process slows a pass to half
    "RAY_memory_monitor_refresh_ms": "0",  # a nearly full machine is normal here: the byte budget rules
    "RAY_usage_stats_enabled": "0",
    "RAY_free_objects_period_milliseconds": "0",  # what is dropped is needed at once
    "RAY_enable_metrics_collection": "0",
    "RAY_enable_pipe_based_agent_to_parent_health_check": "1",  # an idle agent ends when its standard input does
    "RAY_start_python_gc_manager_thread": "0",  # it collects garbage for 0.2 s whenever the store is well used
    "RAY_AUTH_MODE": "token",  # whatever Ray's default, or the caller's
    "RAY_AUTH_TOKEN_PATH": None,
    "RAY_ENABLE_K8S_TOKEN_AUTH": None,
}
CONSTANTS = {  # which Ray has read from the environment when it was imported
    "ENABLE_RAY_CLUSTER": False,  # it takes 127.0.0.1 for the machine's address then, and listens there alone
    "RAY_DISABLE_FAILURE_SIGNAL_HANDLER": True,  # of the caller's process: it prints C++ stacks on standard error
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": False,  # under `uv run` a runtime environment would be made
}
LOOPBACK = "127.0.0.1"
IDLE_AGENTS = ("dashboard_agent", "runtime_env_agent")  # the raylet ends without them; nobody here calls them
SPARE_DAEMONS = ("start_monitor", "start_api_server", "start_log_monitor")
"""They start the autoscaler, the dashboard and the reader of logs: 150 MB, and 1 s of each start, for nothing here."""


class LocalRay:
    """A Ray instance of our own on this machine; or the caller's, if one is running, which we then leave alone.

    Its actors are called over `line`.
    """

    def __init__(self, store_bytes: int) -> None:
        """Raises `RuntimeFailure` when Ray does not start."""
        self.is_ours = not ray.is_initialized()
        self.line = Line()
        self._pid = os.getpid()
        self._end = ExitStack()
        if self.is_ours:
            check_shared_memory(store_bytes)
            sweep()
            try:
                self._start_or_undo(store_bytes)
            except Exception as error:
                why = "\n".join([str(error), *getattr(error, "__notes__", ()), ADVICE])
                raise RuntimeFailure(f"Ray did not start: {why}") from error

    def _start_or_undo(self, store_bytes: int) -> None:
        """Start; what failed leaves nothing."""
        folder = SessionFolder()
        self._end.callback(folder.close)
        try:
            log = RayLog(log_folder())
            self._end.callback(log.save_tails, folder.for_ray)
            self._end.enter_context(speaking_to(log))
            self._start(store_bytes, folder.for_ray, log)
        except BaseException as error:
            for line in _fatal_lines(folder.for_ray):
                error.add_note(line)
            self.close()
            raise
        folder.is_ready = True
        self.line = Line(log.path)
        atexit.register(self.close)

    def _start(self, store_bytes: int, folder: Path, log: RayLog) -> None:
        run = {"RAY_AUTH_TOKEN": secrets.token_hex(32), VARIABLE: str(log.path)}
        self._end.callback(_read_environment)  # as it will be then: the caller's
        with environment(ENVIRONMENT | run), lean(), uninterrupted(is_start=True):
            _read_environment()
            self._end.callback(_shut_down, folder)
            self._end.callback(log.end)
            ray.init(
                address="local",
                num_cpus=NUM_ACTORS,  # Ray starts as many workers ahead; the actors take exactly these
                object_store_memory=store_bytes,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.WARNING,
                _node_ip_address=LOOPBACK,
                _temp_dir=str(folder),
                _skip_env_hook=True,  # no runtime environment: nobody listens to make it
                _system_config={"automatic_object_spilling_enabled": False},
            )

    def close(self) -> None:
        """End it, if it is ours: after this nothing of it is left. May be called again."""
        if os.getpid() == self._pid:  # and not a fork of ours that exits
            self.line.cut()
            atexit.unregister(self.close)
            self._end.close()


def _shut_down(folder: Path) -> None:
    """Ray's own way, and then the hard one for whatever is still there, also of a start that failed."""
    family = _family(folder)
    for process in family:
        with suppress(psutil.Error):
            if _is_worker(process):
                process.kill()
    with uninterrupted(is_start=False):
        ray.shutdown()
    for process in family:
        with suppress(psutil.Error):
            process.kill()
    have_ended(family, END_TIMEOUT_S)


def have_ended(processes: Sequence[psutil.Process], timeout_s: float) -> bool:
    """Whether all end in time. One that has ended, and whose parent has not asked for its exit code, counts as ended.

    (Where the parent ended first, and the machine's first process asks nobody, such processes stay in the list.)
    """
    deadline, left = time.monotonic() + timeout_s, list(processes)
    while left and time.monotonic() < deadline:
        _, left = psutil.wait_procs(left, 0.05)
        left = [process for process in left if not _is_zombie(process)]
    return not left


def _is_zombie(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def _is_worker(process: psutil.Process) -> bool:
    """An actor, or a worker to become one. Nothing in them is worth a farewell."""
    return (process.cmdline() or [""])[0].startswith("ray::")


def _family(folder: Path) -> list[psutil.Process]:
    """Our Ray's daemons, which are given its folder on their command lines, and all below them."""
    found: list[psutil.Process] = []
    for process in psutil.Process().children():
        with suppress(psutil.Error):
            if any(str(folder) in word for word in process.cmdline()):
                found += [process, *process.children(recursive=True)]
    return found


def _fatal_lines(folder: Path) -> list[str]:
    """What the raylet said as it gave up; Ray's own error does not tell."""
    logs = folder.glob("session_2*/logs/raylet.out")
    lines = [line for log in logs for line in log.read_text(errors="replace").splitlines()]
    return [line.partition("Check failed: ")[2] for line in lines if "Check failed: " in line]


def _read_environment() -> None:
    """Ray's compiled part reads settings and token once in a process; here, again. The settings first: in token mode a
    thread of it that still runs may ask for the token, and ends the process where there is none."""
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


@contextmanager
def speaking_to(log: RayLog) -> Iterator[None]:
    """Inside the block, what Ray says in this process goes to the log, with what its daemons report."""
    worker = ray._private.worker
    says = worker.print_to_stdstream

    def listen(data: Mapping[str, Any], *_: object, **__: object) -> None:
        for line in data.get("lines", ()):
            log.say(f"({data.get('pid')}) {line}")

    worker.print_to_stdstream = listen
    try:
        with logging_to(log):
            yield
    finally:
        worker.print_to_stdstream = says


@contextmanager
def lean() -> Iterator[None]:
    """Inside the block, Ray starts what is needed here and nothing more."""
    build, popen = services._build_python_executable_command_memory_profileable, services.ConsolePopen

    def command(component: str, *args: Any, **kwargs: Any) -> list[str]:
        if component in IDLE_AGENTS:
            return [sys.executable, "-I", "-S", idle_agent.__file__]
        return list(build(component, *args, **kwargs))

    def nothing(self: Node, **settings: object) -> None:
        """In place of a daemon's start."""

    apart = partial(popen, process_group=0)  # a signal to our group is for us: Ray is slow to end without its daemons
    spare = [name for name in SPARE_DAEMONS if hasattr(Node, name)]  # another version may not know one of them
    with (
        replaced(services, {build.__name__: command, "ConsolePopen": apart}),
        replaced(Node, dict.fromkeys(spare, nothing)),
        replaced(ray_constants, CONSTANTS),
    ):
        yield


@contextmanager
def replaced(owner: Any, values: Mapping[str, object]) -> Iterator[None]:
    """Attributes of `owner` have these values inside the block."""
    before = {name: getattr(owner, name) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


@contextmanager
def uninterrupted(*, is_start: bool) -> Iterator[None]:
    """Inside the block signal handlers of Python wait; after it they are what they were before, and get what came.

    During a start, those do not wait that end the process at once, and have an attribute `ends_a_start`.

    A start or an end of Ray that is broken off in its compiled part may crash the process. And Ray's start puts a
    handler of SIGTERM over the caller's, and its end takes it away.
    """
    libc, action = ctypes.CDLL(None), ctypes.create_string_buffer(1024)  # a sigaction, whose size is the system's
    put = ray._private.utils.set_sigterm_handler
    ray._private.utils.set_sigterm_handler = lambda handler: None
    libc.sigaction(signal.SIGTERM, None, action)
    try:
        with ExitStack() as waiting:
            if threading.current_thread() is threading.main_thread():
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                    if not (is_start and hasattr(signal.getsignal(number), "ends_a_start")):
                        waiting.enter_context(_deferred(number))
            yield
    finally:
        libc.sigaction(signal.SIGTERM, action, None)
        ray._private.utils.set_sigterm_handler = put


@contextmanager
def _deferred(number: int) -> Iterator[None]:
    """Of the main thread."""
    handler, came = signal.getsignal(number), list[FrameType | None]()
    if not callable(handler):  # the system's own
        yield
        return
    signal.signal(number, lambda _, frame: came.append(frame))
    try:
        yield
    finally:
        signal.signal(number, handler)
        if came:
            handler(number, came[0])
