"""A module of ours run in a process of its own, with a deadline that holds whatever it started."""

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress

import psutil

from llmcad_actors.errors import DeadlineError, RuntimeFailure

END_TIMEOUT_S = 5.0
TAIL = 400


def run_module(module: str, arguments: Sequence[str] = (), *, timeout_s: float) -> str:
    """Standard output of `python -m module`.

    Raises `DeadlineError` (the process and its descendants are ended first), `RuntimeFailure` on a bad exit code.
    """
    # Files, not pipes: a descendant that stays alive cannot keep the reader waiting.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen([sys.executable, "-m", module, *arguments], stdout=out, stderr=err)
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise DeadlineError(f"{module} did not end within {timeout_s:.0f} s and was ended") from None
        finally:
            _end(process)
        out.seek(0)
        err.seek(0)
        if code:
            last = err.read().strip()[-TAIL:]
            raise RuntimeFailure(f"{module} failed with exit code {code}: {last}")
        return out.read()


def _end(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is not None:
        return
    with suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.kill()
    process.kill()
    with suppress(subprocess.TimeoutExpired):
        process.wait(END_TIMEOUT_S)
