"""The files of a batch: a JSON object a line, prompts in and results out.

    in    {"prompt": "...", "id": "...", and options as `Engine.submit` has them}
    out   {"id": "...", "text": "...", "token_ids": [...], "finish_reason": "...", "stats": {...}}, or {"id", "error"}

Results are appended as they come. What an interruption left of a line is taken away, and lines with a text count as
done; lines with an error are tried again.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

from llmcad_actors.core.quoting import quoted, shown
from llmcad_actors.errors import ConfigError, StorageError
from llmcad_actors.requests.options import Options, RequestOptions
from llmcad_actors.storage.small_file import MB, opened, parse_json, reason

MOST_BYTES = 1000 * MB
LINE_BYTES = 64 * MB
NOT_HERE = ("provisional",)


@dataclass(frozen=True, slots=True)
class Line:
    """A prompt of the file."""

    id: str
    prompt: str
    options: Options


def read_lines(file: Path, defaults: Mapping[str, Any]) -> list[Line]:
    """All prompts, each with its options, `defaults` where it has none. Empty lines are left out.

    Raises `ConfigError`, which names the line, before anything is run.
    """
    lines, seen = list[Line](), dict[str, int]()
    for number, data in _raw_lines(file):
        line = _parsed(f"{shown(file)}, line {number}", data, defaults, number)
        if line.id in seen:
            raise ConfigError(
                f"{shown(file)}, line {number}: the id {quoted(line.id)} is that of line {seen[line.id]} too; give "
                "each line an id of its own, or none"
            )
        seen[line.id] = number
        lines.append(line)
    if not lines:
        raise ConfigError(f'{shown(file)} holds no prompts; write lines such as {{"prompt": "Once upon a time"}}')
    return lines


def _raw_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    with opened(file, ConfigError) as (stream, size):
        if size > MOST_BYTES:
            raise ConfigError(f"{shown(file)} has {size:,} bytes, and {MOST_BYTES:,} are the most; split it")
        for number, data in enumerate(stream, start=1):
            if len(data) > LINE_BYTES:
                raise ConfigError(f"{shown(file)}, line {number} has more than {LINE_BYTES // MB} MB")
            if data.strip():
                yield number, data


def _parsed(where: str, data: bytes, defaults: Mapping[str, Any], number: int) -> Line:
    try:
        value = parse_json(data)
    except ValueError as error:
        raise ConfigError(f"{where} is not JSON: {shown(error)}") from None
    if not isinstance(value, dict) or "prompt" not in value:
        raise ConfigError(f'{where} is not an object with a prompt, such as {{"prompt": "Once upon a time"}}')
    prompt, id_ = value.pop("prompt"), value.pop("id", str(number))
    if isinstance(id_, bool) or not isinstance(id_, str | int):
        raise ConfigError(f"{where}: id: {quoted(id_)} must be text or a whole number")
    for name in NOT_HERE:
        if name in value:
            raise ConfigError(f"{where}: the option {quoted(name)} has no meaning in a batch; leave it out")
    if isinstance(value.get("logit_bias"), dict):
        value["logit_bias"] = {_number(where, token): bias for token, bias in value["logit_bias"].items()}
    options: Options = {**defaults, **value}  # type: ignore[typeddict-item]
    try:
        RequestOptions(prompt, options)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    return Line(str(id_), prompt, options)


def _number(where: str, token: str) -> int:
    """JSON's keys are texts."""
    try:
        return int(token)
    except ValueError:
        raise ConfigError(f"{where}: logit_bias: {quoted(token)} is not the id of a token") from None


class Results:
    """The file of results, to which lines are appended. Raises `StorageError` where it cannot be read or written."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.done: set[str] = set()  # ids with a text
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with ExitStack() as undo:
                self._stream: BinaryIO = undo.enter_context(open(file, "a+b"))
                self._read()
                undo.pop_all()  # from now on by `__exit__`
        except OSError as error:
            raise StorageError(f"cannot write results to {shown(file)}: {reason(error)}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def _read(self) -> None:
        """Who is done; a last line without its end is cut off."""
        self._stream.seek(0)
        end = 0
        for number, data in enumerate(self._stream, start=1):
            if not data.endswith(b"\n"):
                self._stream.truncate(end)
                break
            end += len(data)
            if data.strip():
                self._note(number, data)
        self._stream.seek(0, os.SEEK_END)

    def _note(self, number: int, data: bytes) -> None:
        try:
            value = parse_json(data)
            id_ = value["id"]
        except (ValueError, LookupError, TypeError):
            raise StorageError(
                f"{shown(self._file)}, line {number} is not a result of a batch; name another file with --out"
            ) from None
        if "text" in value:
            self.done.add(str(id_))

    def add(self, value: Mapping[str, Any]) -> None:
        """One line, which is on its way to the disk when this returns."""
        try:
            self._stream.write(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
            self._stream.flush()
        except OSError as error:
            raise StorageError(f"cannot write results to {shown(self._file)}: {reason(error)}") from None
