"""What Ray says on its own account goes to a file, never to the caller's standard output or error.

A thread of Ray in this process prints what its daemons report ("A worker died ..."), and its logger writes to standard
error. The files of its processes are in the session's folder, which is removed: where something went wrong, the last
lines of those are saved too. Whoever sees an actor fail notes it here, so the file is there when a message names it.
"""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

VARIABLE = "LLMCAD_RAY_LOG"
"""In the environment of our actors: the log of their Ray."""

MOST_LOGS = 20
MOST_BYTES = 1_000_000  # of a log
TAIL_BYTES = 4000  # of one process's own log
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
NAME = re.compile(r"^:actor_name:(\w+)$", re.MULTILINE)
CHATTER = re.compile(r"^:\w+:|Loading weights: ")  # of a process that is well


class RayLog(logging.Handler):
    """The log of one Ray. The file is made with the first message; the oldest ones are removed then."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.path = folder / f"ray-{datetime.now():%Y-%m-%d-%H-%M-%S-%f}.log"
        self._is_ending = False

    def emit(self, record: logging.LogRecord) -> None:
        self.say(f"{record.levelname}: {record.getMessage()}")

    def say(self, text: str) -> None:
        """Something that Ray said. Of an orderly end it says much that is of no interest."""
        if not self._is_ending:
            note(self.path, text)

    def end(self) -> None:
        self._is_ending = True

    def save_tails(self, session: Path) -> None:
        """Of what its processes wrote to standard error, if anything has been noted: where they crash, only there."""
        for file in sorted(session.glob("session_2*/logs/*.err")) if self.path.exists() else ():
            with suppress(OSError):
                text = file.read_text(errors="replace")
                lines = [line for line in text[-TAIL_BYTES:].splitlines() if line.strip() and not CHATTER.match(line)]
                if lines:
                    name = NAME.search(text)
                    note(self.path, f"standard error of {name[1] if name else file.name}:\n" + "\n".join(lines))


def note(log: Path, text: str) -> None:
    """Add a message to a log, with the time. What cannot be written, or is too much, is dropped."""
    line = f"{datetime.now():%H:%M:%S} {COLOURS.sub('', text).strip()}\n".encode(errors="replace")
    with suppress(OSError):
        if not log.exists():
            log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            for old in sorted(log.parent.glob("ray-*.log"))[: -MOST_LOGS + 1]:
                old.unlink(missing_ok=True)
        with log.open("ab") as file:  # in one piece, whoever else adds to it
            if file.tell() + len(line) <= MOST_BYTES:
                file.write(line)


def named_by_environment() -> Path | None:
    """Of the Ray that runs this process, if llmcad started it."""
    return Path(name) if (name := os.environ.get(VARIABLE)) else None


@contextmanager
def logging_to(log: RayLog) -> Iterator[None]:
    """Inside the block, Ray's logger in this process writes to the log."""
    logger = logging.getLogger("ray")
    handlers, level = logger.handlers, logger.level
    logger.handlers = [log]
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.handlers = handlers
        logger.setLevel(level)
