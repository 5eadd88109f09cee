"""Small files that others wrote, read whole: text and JSON, bounded in size, kind, depth and memory.

Whatever is wrong with such a file, or with its name, is one error of the caller's choice that says so.
"""

import json
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from llmcad_actors.core.quoting import shown
from llmcad_actors.errors import CheckpointError, UserError

MB = 1_000_000
CONFIG_BYTES = 4 * MB  # config.json, generation_config.json, special_tokens_map.json: some KB as a rule
TOKENIZER_CONFIG_BYTES = 8 * MB  # lists every added token
INDEX_BYTES = 16 * MB  # names every tensor: 100,000 of them take 9 MB
TOKENIZER_BYTES = 256 * MB  # tokenizer.json: 33 MB for 262,144 tokens
DEEPEST = 100
_FEW_CONTAINERS = 100_000
_BYTES_PER_CONTAINER = 12

Kind = type[UserError]


@contextmanager
def opened(file: Path, error: Kind = CheckpointError) -> Iterator[tuple[BinaryIO, int]]:
    """A regular file to read, and its size. Raises `error` for any other, and where reading fails."""
    try:
        with open(file, "rb", opener=_without_waiting) as stream:
            status = os.fstat(stream.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise error(f"{shown(file)} is not a regular file; put a file with that content in its place.")
            yield stream, status.st_size
    except (OSError, ValueError) as problem:  # ValueError: a name with a null byte in it
        raise error(f"cannot read {shown(file)}: {reason(problem)}; is it there, and may it be read?") from None


def _without_waiting(path: str, flags: int) -> int:
    """A pipe that nobody writes to would be waited for."""
    return os.open(path, flags | os.O_NONBLOCK)


def read_small(file: Path, most_bytes: int, error: Kind = CheckpointError) -> bytes:
    """A regular file's bytes. Raises `error` for any other, a larger one, and one that cannot be read."""
    with opened(file, error) as (stream, size):
        if size > most_bytes:
            raise error(
                f"{shown(file)} has {size:,} bytes, and such a file has at most {most_bytes:,}; fetch it again."
            )
        return stream.read(most_bytes + 1)


def read_text(file: Path, most_bytes: int, error: Kind = CheckpointError) -> str:
    """UTF-8 text. Raises `error`."""
    try:
        return read_small(file, most_bytes, error).decode("utf-8")
    except UnicodeDecodeError as problem:
        raise error(f"{shown(file)} is not UTF-8 text ({shown(problem)}); fetch the file again.") from None


def read_object(file: Path, most_bytes: int = CONFIG_BYTES, error: Kind = CheckpointError) -> dict[str, Any]:
    """A JSON object. Raises `error`."""
    try:
        value = parse_json(read_small(file, most_bytes, error))
    except ValueError as problem:
        raise error(f"{shown(file)} cannot be read as JSON: {shown(problem)}; fetch the file again.") from None
    if not isinstance(value, dict):
        raise error(f"{shown(file)} is not a JSON object; fetch the file again.")
    return value


def parse_json(data: bytes, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """A JSON value, in memory of some ten times its bytes. Raises ValueError, also for nesting beyond all use.

    pairs: what makes an object of its keys and values; default: a dict in which the last of equal keys counts.
    """
    if data.count(b"[") + data.count(b"{") > max(_FEW_CONTAINERS, len(data) // _BYTES_PER_CONTAINER):
        raise ValueError("it consists of brackets, as no such file does")  # each takes dozens of bytes of memory
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=pairs)
    except RecursionError:
        raise _too_deep() from None
    _check_depth(value)
    return value


def reason(problem: Exception) -> str:
    """Why a file could not be opened, in words."""
    return shown((isinstance(problem, OSError) and problem.strerror) or problem)


def _check_depth(value: Any) -> None:
    """What recurses over a value later on must not run out of stack."""
    level = _containers([value])
    for _ in range(DEEPEST):
        level = [inner for outer in level for inner in _containers(outer)]
        if not level:
            return
    raise _too_deep()


def _containers(of: Any) -> list[Any]:
    return [value for value in (of.values() if isinstance(of, dict) else of) if isinstance(value, dict | list)]


def _too_deep() -> ValueError:
    return ValueError(f"it is nested more than {DEEPEST} levels deep")
