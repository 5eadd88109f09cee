"""The trace file: what all actors did during a request, as a stream of msgpack values.

    header   a map: format, version, models, settings, prompt, and the clock at the start
    batches  `TraceBatch` after `TraceBatch`, of any actor, as they were collected
    footer   a map: the lanes that did not answer in the end

Times are seconds on the machine's monotonic clock. Knows no Ray: who collects is another's business.
"""

import io
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmcad_actors.core.quoting import quoted, shown
from llmcad_actors.core.trace import TraceBatch
from llmcad_actors.core.tree import TokenTree
from llmcad_actors.errors import UserError
from llmcad_actors.messages import pack, unpack_stream
from llmcad_actors.storage.small_file import MB, read_small, reason

FORMAT = "llmcad trace"
VERSION = 1
TRACE_BYTES = 256 * MB  # some 30,000 passes; in memory it is several times as much
_DEEPEST = 8
_LATEST = 1e12  # seconds
_IDS = range(1 << 31)
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
        except (OSError, ValueError) as error:
            raise UserError(f"cannot write the trace to {shown(path)}: {reason(error)}") from None
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
    if path is not None and not _is_writable(path):
        raise UserError(
            f"cannot write the trace to {shown(path)}: give a file in a folder that exists and can be written to"
        )


def _is_writable(path: Path) -> bool:
    try:
        path.stat()
    except FileNotFoundError:
        folder = path.absolute().parent
        return folder.is_dir() and os.access(folder, os.W_OK)
    except (OSError, ValueError):  # a name that cannot be
        return False
    return not path.is_dir() and os.access(path, os.W_OK)


def read_trace(path: Path) -> Trace:
    """Raises `UserError` for a file that is absent, foreign, cut short, or says what no run says."""
    try:
        data = read_small(path, TRACE_BYTES, UserError)
    except UserError as error:
        raise UserError(f"cannot read the trace: {error}") from None
    values = unpack_stream(io.BytesIO(data))
    return _rest(path, _header(path, values), values)


def _header(path: Path, values: Iterator[Any]) -> TraceHeader:
    try:
        first = next(values, None)
    except ValueError:
        first = None
    if not isinstance(first, dict) or first.get("format") != FORMAT:
        raise UserError(f"{shown(path)} is not a trace; `llmcad generate --trace FILE` writes one")
    if first.get("version") != VERSION:
        raise UserError(
            f"{shown(path)} is a trace of version {quoted(first.get('version'))}, this llmcad reads {VERSION}; record "
            "it again"
        )
    for name, is_right in _HEADER.items():
        if name not in first or not is_right(first[name]):
            found = f"says {name}: {quoted(first[name])}" if name in first else f"lacks {name!r}"
            raise UserError(f"{shown(path)}: the trace's header {found}; record it again")
    return TraceHeader(**{name: first[name] for name in TraceHeader.__slots__})


def _rest(path: Path, header: TraceHeader, values: Iterator[Any]) -> Trace:
    events: list[TraceEvent] = []
    dropped = 0
    try:
        for value in values:
            if isinstance(value, TraceBatch):
                events += _events(value)
                dropped += value.num_dropped
            elif isinstance(value, dict) and value.get(_END):
                events.sort(key=lambda event: (event.start, -event.end))
                return Trace(header, tuple(events), dropped, _checked(value.get("missing"), _are_texts, "missing"))
            else:
                raise ValueError(f"it holds {quoted(value)}")
        why = "it has no end"
    except ValueError as error:
        why = str(error)
    raise UserError(f"{shown(path)} is not a whole trace: {why}; was the run killed, or the copy cut? Record it again")


def _events(batch: TraceBatch) -> Iterator[TraceEvent]:
    """What the views rely on is checked here, and nowhere else. Raises ValueError."""
    _checked(batch.lane, _is_text, "a lane")
    _checked(batch.num_dropped, _is_count, "num_dropped")
    for span in _checked(batch.spans, _is_tuple, "spans"):
        if not (_is_tuple(span) and len(span) == 4 and _is_text(span[0]) and _is_time(span[1]) and _is_time(span[2])):
            raise ValueError(f"it holds the event {quoted(span)}")
        name, start, end, data = span
        if start > end or not _is_object(data):
            raise ValueError(f"it holds the event {quoted(span)}")
        for key, is_right in _EVENTS.get((batch.lane, name), {}).items():
            _checked(data.get(key), is_right, f"{batch.lane}'s {name} with {key}")
        yield TraceEvent(batch.lane, name, start, end, data)


def _checked(value: Any, is_right: Any, what: str) -> Any:
    if not is_right(value):
        raise ValueError(f"it holds {shown(what)} {quoted(value)}")
    return value


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_text_or_none(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_tuple(value: Any) -> bool:
    return isinstance(value, tuple)


def _are_texts(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(item, str) for item in value)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_id(value: Any) -> bool:
    return type(value) is int and value in _IDS


def _are_ids(value: Any) -> bool:
    return isinstance(value, tuple) and all(_is_id(item) for item in value)


def _is_prompt(value: Any) -> bool:
    return _are_ids(value) and bool(value)


def _is_time(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= _LATEST  # also false for what is no number


def _is_tree(value: Any) -> bool:
    return isinstance(value, TokenTree) and all(token in _IDS for token in value.tokens.tolist())


def _is_object(value: Any) -> bool:
    return isinstance(value, dict) and _is_plain(value, 0)


def _is_plain(value: Any, depth: int) -> bool:
    """What JSON can say, and trees."""
    if depth > _DEEPEST:
        return False
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_plain(each, depth + 1) for k, each in value.items())
    if isinstance(value, tuple):
        return all(_is_plain(item, depth + 1) for item in value)
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, str | int | TokenTree)


_HEADER = {
    "target": _is_text,
    "draft": _is_text_or_none,
    "settings": _is_object,
    "prompt": _is_prompt,
    "max_new_tokens": _is_count,
    "started": _is_time,
    "date": _is_text,
    "llmcad": _is_text,
}
_EVENTS = {
    ("coordinator", "submission"): {"tree": _is_tree},
    ("coordinator", "verdict"): {"path": _are_ids, "bonus": _is_id},
    ("draft", "step"): {"provisional": _is_bool},
    ("draft", "reroot"): {"head_start": _is_bool},
    ("loader", "read"): {"bytes": _is_count},
}
"""What the views ask of an event, by lane and name."""
