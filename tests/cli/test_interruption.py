"""Signals end the command: the first one in order and with its exit code, the second one at once."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.actors.test_lifecycle import becomes_true, driver

SIGNALS = [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "ended by SIGTERM"), (signal.SIGHUP, "ended by SIGHUP")]
DEADLINE_S = 60.0

COMMAND = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests that run in the background ignore it
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and under nohup this
from llmcad_actors.cli import commands as cli
from llmcad_actors.cli import command
from llmcad_actors.cli import interruption
interruption.PATIENCE_S = float(sys.argv.pop(1))

@cli.app.command()
@cli.reports_errors
def wait(closes: bool = True) -> None:
    child = subprocess.Popen(["sleep", "600"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        print(child.pid, flush=True)
        time.sleep(600)
    finally:
        print("closing", flush=True)
        if not closes:
            time.sleep(600)
        child.kill()

sys.argv = ["llmcad", "wait", *sys.argv[1:]]
command.main()
"""

WITH_RAY = """
import signal, sys, time
from llmcad_actors.cli.interruption import exit_code, interruptible
signal.signal(signal.SIGINT, signal.default_int_handler)
with interruptible():
    import ray
    from llmcad_actors.actors.lean_ray import LocalRay
    init = ray.init
    def slow(**settings):
        print("starting", flush=True)
        init(**settings)
    ray.init = slow
    def connected():
        print("connected", flush=True)
        time.sleep(float(sys.argv[1]))
    ray._private.worker._post_init_hooks.append(connected)
    local = LocalRay(80_000_000)
    try:
        print("started", flush=True)
        time.sleep(600)
    except KeyboardInterrupt:
        local.close()
raise SystemExit(exit_code())
"""


@contextmanager
def command(*arguments: str, patience_s: str = "1000") -> Iterator[tuple["subprocess.Popen[str]", psutil.Process]]:
    """The command that waits, and the process that it started."""
    with subprocess.Popen(
        [sys.executable, "-c", COMMAND, patience_s, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            yield process, psutil.Process(int(process.stdout.readline()))
        finally:
            process.kill()


def is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize(("number", "said"), SIGNALS)
def test_the_first_signal_closes_in_order_and_is_the_exit_code(number: int, said: str) -> None:
    with command() as (process, child):
        process.send_signal(number)
        out, err = process.communicate(timeout=DEADLINE_S)
        assert (process.returncode, out, err) == (128 + number, "closing\n", f"llmcad: {said}\n")
        assert becomes_true(lambda: is_gone(child))


def test_the_second_signal_ends_everything_at_once(tmp_path: Path) -> None:
    with command("--no-closes") as (process, child):
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        assert process.stdout.readline() == "closing\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=DEADLINE_S) == ("", "llmcad: interrupted\n")
        assert process.returncode == 128 + signal.SIGINT
        assert becomes_true(lambda: is_gone(child))


def test_closing_that_takes_too_long_is_not_waited_for() -> None:
    with command("--no-closes", patience_s="0.1") as (process, child):
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 128 + signal.SIGINT
        assert becomes_true(lambda: is_gone(child))


@pytest.mark.parametrize("moment", ["starting", "connected", "started"])
def test_sigterm_leaves_nothing_of_ray_and_nothing_on_the_screen(moment: str) -> None:
    """Ray's own handlers would print a C++ stack and abort."""
    with (
        tempfile.TemporaryFile("w+") as err,
        driver("-c", WITH_RAY, "600" if moment == "connected" else "0", stderr=err) as running,
    ):
        while running.stdout.readline() != f"{moment}\n":
            assert running.process.poll() is None
        os.kill(running.process.pid, signal.SIGTERM)
        assert running.process.wait(DEADLINE_S) == 128 + signal.SIGTERM
        assert becomes_true(lambda: not running.others()), running.others()
        assert list(running.folder.iterdir()) == []
        err.seek(0)
        assert err.read() in ("", "llmcad: ended by SIGTERM\n")
