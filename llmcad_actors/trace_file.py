"""The trace file: what all actors did during a request, as a stream of msgpack values.

    header   a map: format, version, models, settings, prompt, and the clock at the start
    batches  `TraceBatch` after `TraceBatch`, of any actor, as they were collected
    footer   a map: the lanes that did not answer in the end

Times are seconds on the machine's monotonic clock. Knows no Ray: who collects is another's business.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmcad_actors.core.trace import TraceBatch
from llmcad_actors.errors import UserError
from llmcad_actors.messages import pack, unpack_stream

FORMAT = "llmcad trace"
VERSION = 1
_END = "end of trace"


@dataclass(frozen=True, slots=True)
class TraceHeader:
    """What was run."""

    target: str  # the model's directory
    draft: str | None
    settings: Mapping[str, Any]  # the `EngineConfig`'s fields
    prompt: tuple[int, ...]
    max_new_tokens: int
    started: float  # monotonic seconds
    date: str  # of day, ISO 8601
    llmcad: str  # version of the program


@dataclass(frozen=True, slots=True)
class TraceEvent:
    """What an actor did from `start` to `end`, monotonic seconds; the same for a moment."""

    lane: str
    name: str
    start: float
    end: float
    data: Mapping[str, Any]

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Trace:
    """A whole file. Events are sorted by start."""

    header: TraceHeader
    events: tuple[TraceEvent, ...]
    num_dropped: int  # events that an actor had no memory for
    missing: tuple[str, ...]  # lanes that did not answer in the end

    def named(self, lane: str, name: str) -> list[TraceEvent]:
        return [event for event in self.events if (event.lane, event.name) == (lane, name)]


class TraceWriter:
    """Writes header, batches, footer. Raises `UserError` when the file cannot be made."""

    def __init__(self, path: Path, header: TraceHeader) -> None:
        try:
            self._file = path.open("wb")
        except OSError as error:
            raise UserError(f"cannot write the trace to {path}: {error.strerror}") from None
        fields = {name: getattr(header, name) for name in TraceHeader.__slots__}
        self.write(pack({"format": FORMAT, "version": VERSION, **fields}))

    def write(self, packed: bytes) -> None:
        """A packed `TraceBatch`."""
        self._file.write(packed)
        self._file.flush()

    def close(self, missing: Sequence[str] = ()) -> None:
        self.write(pack({_END: True, "missing": tuple(missing)}))
        self._file.close()


def check_writable(path: Path | None) -> None:
    """Raises `UserError` where no trace can be written: to be known before anything is started."""
    if path is not None and (
        path.is_dir() or not os.access(path if path.exists() else path.absolute().parent, os.W_OK)
    ):
        raise UserError(f"cannot write the trace to {path}: give a file in a folder that exists and can be written to")


def read_trace(path: Path) -> Trace:
    """Raises `UserError` for a file that is absent, foreign or cut short."""
    try:
        with path.open("rb") as file:
            values = unpack_stream(file)
            header = _header(path, values)
            return _rest(path, header, values)
    except OSError as error:
        raise UserError(f"cannot read the trace {path}: {error.strerror}") from None


def _header(path: Path, values: Iterator[Any]) -> TraceHeader:
    try:
        first = next(values, None)
    except ValueError:
        first = None
    if not isinstance(first, dict) or first.get("format") != FORMAT:
        raise UserError(f"{path} is not a trace; `llmcad generate --trace FILE` writes one")
    if first.get("version") != VERSION:
        raise UserError(
            f"{path} is a trace of version {first.get('version')}, this llmcad reads {VERSION}; record it again"
        )
    try:
        return TraceHeader(**{name: first[name] for name in TraceHeader.__slots__})
    except KeyError as error:
        raise UserError(f"{path}: the trace's header lacks {error}; record it again") from None


def _rest(path: Path, header: TraceHeader, values: Iterator[Any]) -> Trace:
    events: list[TraceEvent] = []
    dropped = 0
    try:
        for value in values:
            if isinstance(value, TraceBatch):
                events += [TraceEvent(value.lane, *span) for span in value.spans]
                dropped += value.num_dropped
            elif isinstance(value, dict) and value.get(_END):
                events.sort(key=lambda event: (event.start, -event.end))
                return Trace(header, tuple(events), dropped, value["missing"])
        why = "it has no end"
    except ValueError as error:
        why = str(error)
    raise UserError(f"{path} is not a whole trace: {why}; was the run killed, or the copy cut? Record it again")
