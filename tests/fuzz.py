"""Models, traces and settings as nobody should write them, through the commands that read them.

    python -m tests.fuzz --models 10000 --traces 1000 --yaml 1000 --seed 1

Sound files are spoilt by chance, one case after the other, and given to `llmcad plan` and `llmcad trace` in a worker
process that is watched: a traceback, a death, more than 5 s of computing or 500 MB of memory is a failure. What was
found is printed with how to see it again; the last line sums up. Exit code 1: something failed.
"""

import argparse
import json
import os
import random
import resource
import select
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from tests.fuzz_files import SPOILERS, Sound

MB = 1_000_000
MOST_SECONDS, MOST_BYTES = 5.0, 500 * MB
HANGS_S = 60.0  # on the clock, which a busy machine stretches
MOST_MESSAGE = 6000  # characters; the table of a cap that is too small is the longest
ADDRESSES = 2000 * MB  # beyond those of the worker at its start: what takes more is stopped


@dataclass(frozen=True, slots=True)
class Case:
    """One file, or folder of files. The same everywhere."""

    kind: str  # "models" | "traces" | "yaml"
    seed: int
    number: int

    def __str__(self) -> str:
        return f"{self.kind}:{self.number}"

    def random(self) -> random.Random:
        return random.Random(f"{self.kind} {self.seed} {self.number}")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a case."""

    exit_code: int
    seconds: float  # on the clock
    cpu_seconds: float
    rss_bytes: int  # the most, above what the worker had before the case
    trouble: str = ""  # what must not be
    said: str = ""

    @property
    def failure(self) -> str:
        if self.trouble:
            return self.trouble
        if self.cpu_seconds > MOST_SECONDS:
            return f"took {self.cpu_seconds:.1f} s"
        return f"took {self.rss_bytes / MB:.0f} MB" if self.rss_bytes > MOST_BYTES else ""


@dataclass(slots=True)
class Tally:
    """Of all cases so far."""

    count: int = 0
    accepted: int = 0
    failures: dict[str, str] = field(default_factory=dict)
    kinds: Counter[str] = field(default_factory=Counter)
    most: dict[str, float] = field(default_factory=lambda: {"seconds": 0.0, "cpu_seconds": 0.0, "rss_bytes": 0})

    def add(self, case: Case, outcome: Outcome) -> None:
        self.count += 1
        self.kinds[case.kind] += 1
        self.accepted += outcome.exit_code == 0
        for name, value in self.most.items():
            self.most[name] = max(value, getattr(outcome, name))
        if outcome.failure:
            self.failures[str(case)] = outcome.failure

    def line(self, seed: int) -> str:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.kinds.items())
        slowest, cpu, rss = self.most.values()
        return (
            f"{kinds} (seed {seed}): {len(self.failures)} failures; {self.accepted:,} were still sound; the most: "
            f"{cpu:.1f} s of computing, {slowest:.1f} s on the clock, {rss / MB:.0f} MB"
        )


# ------------------------------------------------------------------------------------------------------ worker


def work(folder: Path) -> None:
    """Cases from standard input, an outcome a line to standard output."""
    from llmcad_actors.cli.commands import app  # with all that planning needs, before memory is measured

    os.environ["LLMCAD_CACHE"] = str(folder / "cache")
    sound, pid = Sound.at(folder / "sound"), os.getpid()
    run(app, ["plan", "--target", str(sound.models[0]), "--draft", str(sound.models[0]), "--memory", "8GB"])
    for kind in ("", "--tree"):
        run(app, ["trace", str(sound.trace), *([kind, "1"] if kind else [])])
    started = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (started + ADDRESSES, started + ADDRESSES))
    answers = sys.stdout
    for line in sys.stdin:
        case = Case(**json.loads(line))
        place = Path(tempfile.mkdtemp(prefix="case-", dir=folder))
        try:
            commands = list(SPOILERS[case.kind](sound, place, case.random()))
            outcome = _watched(app, commands)
        finally:
            shutil.rmtree(place, ignore_errors=True)
        print(json.dumps(asdict(outcome)), file=answers, flush=True)


def _watched(app: Any, commands: list[list[str]]) -> Outcome:
    """All commands of a case; the first trouble counts."""
    code, said, trouble = 0, "", ""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: spoiling files takes memory too
    base, began, cpu = _status("VmRSS"), time.monotonic(), time.process_time()
    for command in commands:
        code, said, trouble = run(app, command)
        if trouble:
            break
    seconds, cpu_seconds = time.monotonic() - began, time.process_time() - cpu
    return Outcome(code, seconds, cpu_seconds, _status("VmHWM") - base, trouble, said[:500])


def run(app: Any, command: list[str]) -> tuple[int, str, str]:
    """Exit code, what was said on standard error, and what must not be."""
    from typer.testing import CliRunner

    result = CliRunner().invoke(app, command)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        lines = traceback.format_exception(*result.exc_info) if result.exc_info else []
        return result.exit_code, result.stderr, "a traceback:\n" + "".join(lines)[-3000:]
    if "Traceback" in result.stderr or len(result.stderr) > MOST_MESSAGE:
        return result.exit_code, result.stderr, f"said {len(result.stderr)} characters: {result.stderr[:1000]}"
    if result.exit_code not in (0, 2):
        return result.exit_code, result.stderr, f"exit code {result.exit_code}: {result.stderr[:1000]}"
    return result.exit_code, result.stderr, ""


def _status(name: str) -> int:
    """Bytes of this process, as Linux counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


# ------------------------------------------------------------------------------------------------------ parent


class Worker:
    """A process that runs case after case; replaced after a failure."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def outcome(self, case: Case) -> Outcome:
        if self._process is None:
            self._process = self._started()
        found = self._ask(self._process, case)
        if found.failure:
            self.close()
        return found

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    with suppress(OSError):
                        pipe.close()
        self._process = None

    def _started(self) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "tests.fuzz", "--worker", str(self._folder)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONFAULTHANDLER": "1"}
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)

    def _ask(self, process: "subprocess.Popen[bytes]", case: Case) -> Outcome:
        assert process.stdin is not None
        assert process.stdout is not None
        began = time.monotonic()
        process.stdin.write(json.dumps(asdict(case)).encode() + b"\n")
        process.stdin.flush()
        line = _line(process.stdout, HANGS_S + 60.0)  # its start included
        seconds = time.monotonic() - began
        if line is None:
            return Outcome(-1, seconds, 0.0, 0, "hangs")
        if not line:
            return Outcome(-1, seconds, 0.0, 0, f"the process died: {process.wait()}")
        return Outcome(**json.loads(line))


def _line(stream: IO[bytes], timeout_s: float) -> bytes | None:
    """The next line; b"" at the end, None when none comes."""
    if not select.select([stream], [], [], timeout_s)[0]:
        return None
    return stream.readline()


def cases(models: int, traces: int, yaml: int, seed: int) -> Iterator[Case]:
    for kind, count in {"models": models, "traces": traces, "yaml": yaml}.items():
        for number in range(count):
            yield Case(kind, seed, number)


def fuzz(chosen: list[Case], folder: Path, *, say: bool = True) -> Tally:
    """Run the cases. `folder` takes the sound files and, one at a time, the spoilt ones."""
    Sound.make(folder / "sound")
    tally, worker = Tally(), Worker(folder)
    try:
        for case in chosen:
            outcome = worker.outcome(case)
            tally.add(case, outcome)
            if say and outcome.failure:
                print(
                    f"--- {case} (python -m tests.fuzz --seed {case.seed} --only {case}): {outcome.failure}", flush=True
                )
            elif say and len(chosen) == 1:
                print(outcome)
    finally:
        worker.close()
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for kind in SPOILERS:
        parser.add_argument(f"--{kind}", type=int, default=0, help="how many cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one case, such as models:17")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker)
        return 0
    chosen = list(cases(options.models, options.traces, options.yaml, options.seed))
    if options.only:
        kind, _, number = options.only.partition(":")
        chosen = [Case(kind, options.seed, int(number))]
    with tempfile.TemporaryDirectory(prefix="llmcad-fuzz-") as folder:
        tally = fuzz(chosen, Path(folder))
    print(tally.line(options.seed))
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())
