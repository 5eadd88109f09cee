"""Whatever ends the driver, nothing of llmcad or Ray stays behind: no process, no shared memory."""

import os
import pty
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import psutil
import pytest

from llmcad_actors.machine.sessions import sweep
from llmcad_actors.tools.bundled import bundled_draft, bundled_target
from tests.actors.engines import job

GONE_AFTER_S = 15.0
START_S = 120.0
MARK = "LLMCAD_TEST"
DRIVER = """
import sys
from llmcad_actors import Engine
target, draft, memory = sys.argv[1:]
try:
    with Engine.launch(target, draft, memory=memory, read_limit="10MB/s") as engine:
        for _ in engine.stream("def f(", max_new_tokens=500, provisional=True):
            print("a pass is under way", flush=True)
except KeyboardInterrupt:
    print("closed", flush=True)
    sys.stdin.read()
"""

HEARING = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)  # tests that run in the background ignore it, and so would the command
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


class Driver:
    """A process of its own session, and everything that it starts, known by a mark in the environment."""

    def __init__(self, command: list[str], folder: str, streams: Mapping[str, IO[str]]) -> None:
        self._mark = uuid.uuid4().hex
        self._shared_memory = set(os.listdir("/dev/shm"))
        self.folder = Path(folder)
        self.process = subprocess.Popen(
            [sys.executable, "-c", HEARING, *command],
            env=os.environ | {MARK: self._mark, "TMPDIR": folder},
            stdin=streams.get("stdin", subprocess.PIPE),
            stdout=subprocess.PIPE,
            stderr=streams.get("stderr"),
            text=True,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        self.stdout = self.process.stdout

    def others(self) -> list[psutil.Process]:
        """Living processes with the mark, the driver apart."""
        return [p for p in psutil.process_iter() if p.pid != self.process.pid and self._is_marked(p)]

    def _is_marked(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get(MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False

    def plasma_files(self) -> set[str]:
        """Shared memory of an object store that has come since the start."""
        return {name for name in set(os.listdir("/dev/shm")) - self._shared_memory if "plasma" in name}

    def end(self) -> None:
        self.process.kill()
        for process in self.others():
            process.kill()
        self.process.communicate()


@contextmanager
def driver(*command: str, **streams: IO[str]) -> Iterator[Driver]:
    # Ray's sockets live there, and a socket's path must be short.
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="t", ignore_cleanup_errors=True) as folder:
        running = Driver(list(command), folder, streams)
        try:
            yield running
        finally:
            running.end()


def becomes_true(condition: Callable[[], bool], within_s: float = GONE_AFTER_S) -> bool:
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


@pytest.fixture(scope="module")
def memory() -> str:
    """The smallest cap: every pass reads the whole target, for seconds."""
    return str(job(bundled_target(), bundled_draft()).memory.cap_bytes)


def test_ctrl_c_during_a_pass_closes_the_engine(memory: str) -> None:
    with driver("-c", DRIVER, str(bundled_target()), str(bundled_draft()), memory) as running:
        assert running.stdout.readline() == "a pass is under way\n"
        assert len(running.others()) > 4
        groups = {os.getpgid(process.pid) for process in running.others()}
        assert running.process.pid not in groups  # a signal to the command's group leaves it to end the others
        os.killpg(running.process.pid, signal.SIGINT)
        assert "closed\n" in iter(running.stdout.readline, "")
        assert becomes_true(lambda: not running.others()), running.others()
        assert not running.plasma_files()
        assert not list(running.folder.glob("llmcad-*"))
        assert running.process.communicate("")[0] == ""
        assert running.process.returncode == 0


def test_ctrl_c_at_a_terminal_ends_the_command_with_one_line(memory: str, tmp_path: Path) -> None:
    """The status line's thread asks the actors all the while: no call may find Ray ended, and start another."""
    with terminal() as screen, driver(*command(memory, tmp_path), stderr=screen.end, stdin=screen.end) as running:
        assert becomes_true(lambda: "MB/s" in screen.text, START_S)  # a pass is under way
        os.killpg(running.process.pid, signal.SIGINT)
        assert running.process.wait(GONE_AFTER_S) == 130
        assert becomes_true(lambda: not running.others()), running.others()
        assert list(running.folder.iterdir()) == []
        assert becomes_true(lambda: "llmcad: interrupted" in screen.text)
    assert "Traceback" not in screen.text
    assert "Exception" not in screen.text


class Terminal:
    """What is shown on it; `end` is for the program that shows it."""

    def __init__(self) -> None:
        self._ours, theirs = pty.openpty()
        self.end = os.fdopen(theirs, "w")
        self.text = ""

    def read(self) -> None:
        """Until it is closed."""
        with suppress(OSError):
            while text := os.read(self._ours, 65536):
                self.text += text.decode(errors="replace")
        os.close(self._ours)


@contextmanager
def terminal() -> Iterator[Terminal]:
    made = Terminal()
    reader = threading.Thread(target=made.read)
    reader.start()
    try:
        yield made
    finally:
        made.end.close()
        reader.join()


def command(memory: str, folder: Path) -> list[str]:
    """One that takes seconds for each pass."""
    config = folder / "slow.yaml"
    config.write_text("read_limit: 10MB/s\n")
    options = ["--target", str(bundled_target()), "--draft", str(bundled_draft()), "--memory", memory]
    more = ["--config", str(config), "--max-new-tokens", "500"]
    return ["-m", "llmcad_actors.cli", "generate", *options, *more, "def area(r):"]


def test_killing_the_command_during_a_pass_ends_everything(memory: str, tmp_path: Path) -> None:
    with driver(*command(memory, tmp_path)) as running:
        assert running.stdout.read(1)  # the first pass is over, the second under way
        assert len(running.others()) > 4
        running.process.kill()
        assert becomes_true(lambda: not running.others()), running.others()
        assert not running.plasma_files()
        (folder,) = running.folder.iterdir()
        assert sweep(running.folder) == [folder]
