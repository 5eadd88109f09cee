"""Ray on one machine as Ray is, through its public interface alone: for when a new version breaks what is bent.

It takes more memory than the lean one, listens on all interfaces, asks for a token or not as Ray's settings say, keeps
its files in Ray's own folder, leaves in the environment what Ray puts there, and lets Ray speak on the screen.
"""

import atexit
import logging
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil
import ray

from llmcad_actors.actors.calls import Line
from llmcad_actors.actors.environment import OF_ACTORS, environment
from llmcad_actors.actors.ray_log import VARIABLE, RayLog, logging_to
from llmcad_actors.errors import RuntimeFailure
from llmcad_actors.machine.limits import check_shared_memory
from llmcad_actors.machine.sessions import log_folder

NUM_ACTORS = 4
END_TIMEOUT_S = 5.0
DOCUMENTED = {"RAY_USAGE_STATS_ENABLED": "0"}  # nothing of a run leaves the machine


class PlainRay:
    """As `LocalRay`: one of our own, or the caller's if one is running, which we then leave alone."""

    def __init__(self, store_bytes: int) -> None:
        """Raises `RuntimeFailure` when Ray does not start."""
        self.is_ours = not ray.is_initialized()
        self.line = Line()
        self._pid = os.getpid()
        self._end = ExitStack()
        if self.is_ours:
            check_shared_memory(store_bytes)
            others = psutil.Process().children()
            try:
                self._start(store_bytes)
            except Exception as error:
                self.close()
                end_daemons(but=others)  # Ray forgets those of a start that fails
                raise RuntimeFailure(f"Ray did not start: {error}\n`llmcad doctor` may tell more.") from error

    def _start(self, store_bytes: int) -> None:
        log = RayLog(log_folder())
        self._end.enter_context(logging_to(log))
        self._end.callback(ray.shutdown)
        self._end.callback(log.end)
        with environment(OF_ACTORS | DOCUMENTED | {VARIABLE: str(log.path)}), signals_as_before():
            ray.init(
                address="local",
                num_cpus=NUM_ACTORS,
                object_store_memory=store_bytes,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.WARNING,
            )
        self.line = Line(log.path)
        atexit.register(self.close)

    def close(self) -> None:
        """End it, if it is ours. May be called again."""
        if os.getpid() == self._pid:  # and not a fork of ours that exits
            self.line.cut()
            atexit.unregister(self.close)
            self._end.close()


def end_daemons(*, but: Sequence[psutil.Process]) -> None:
    """Kill the programs of Ray's package that this process has started, and all below them; some are left alone."""
    package = str(Path(ray.__file__).parent)
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if child not in but and any(package in word for word in child.cmdline()):
                for process in (*child.children(recursive=True), child):
                    process.kill()
                    process.wait(END_TIMEOUT_S)


@contextmanager
def signals_as_before() -> Iterator[None]:
    """Ray's start puts a handler of SIGTERM over the caller's."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
