"""What crosses processes: frozen values, and their msgpack codec. No pickled classes of ours."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO, cast

import msgpack
import numpy as np

import llmcad_actors.errors as errors
from llmcad_actors.config import DraftSpec, LoaderSpec, VerifierSpec
from llmcad_actors.core.calibration import Calibration
from llmcad_actors.core.choosing import Choosing, TokenLogprobs
from llmcad_actors.core.costs import CostModel, Costs
from llmcad_actors.core.fallback import (
    AdaptiveConfidence,
    FixedDepth,
    FixedTree,
    MarginalThroughput,
    Policy,
    TokenConfidence,
)
from llmcad_actors.core.quoting import quoted, shown
from llmcad_actors.core.request import Request
from llmcad_actors.core.round import Check, Drafting, Grown, PassReport, PassStats, Submission, Verdict
from llmcad_actors.core.stats import Stats
from llmcad_actors.core.trace import TraceBatch
from llmcad_actors.core.tree import TokenTree
from llmcad_actors.core.worth import Worth
from llmcad_actors.errors import LlmcadError, RuntimeFailure


@dataclass(frozen=True, slots=True)
class AskShard:
    """The verifier wants this shard from the loader."""

    shard: str


@dataclass(frozen=True, slots=True)
class EndLease:
    """The verifier is done with a shard: the loader may write over it."""

    number: int


@dataclass(frozen=True, slots=True)
class StreamShards:
    """From now on the loader reads these, in the order of the pass."""

    shards: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DraftOrder:
    """What the draft is told when trees are asked for: all that has happened since the last time."""

    joined: Mapping[int, Request]  # requests that the draft does not know
    ended: tuple[int, ...]  # requests that it knows, and need not any more
    verdicts: Mapping[int, tuple[Verdict, ...]]  # of the requests that want a tree, of all passes since their last one
    policy: Policy
    costs: Costs


Place = tuple[str, int, int]
"""A tensor of a leased shard: name, where it begins in the window, bytes."""


@dataclass(frozen=True, slots=True)
class Lease:
    """A shard for the verifier, which nobody writes over until the lease is ended."""

    number: int
    shard: str
    places: tuple[Place, ...]


@dataclass(frozen=True, slots=True)
class ReadingProgress:
    """Where a pass is, as the loader sees it."""

    shard: str
    index: int  # of the shard, in the pass
    num_shards: int
    bytes_read: int
    read_seconds: float


@dataclass(frozen=True, slots=True)
class Tokens:
    """New tokens for the caller, and the statistics so far (disk figures left out)."""

    ids: tuple[int, ...]
    stats: Stats
    logprobs: tuple[TokenLogprobs, ...] = ()  # of each, if they were asked for


@dataclass(frozen=True, slots=True)
class Provisional:
    """The draft's best guess at what comes next; replaced by the `Tokens` that follow."""

    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class DraftEnded:
    """No request drafts any more: hardly a guess was right, and the draft's memory can hold layers of the target."""


@dataclass(frozen=True, slots=True)
class Finished:
    """The request's end."""

    reason: str  # "stop" | "length"
    stats: Stats


@dataclass(frozen=True, slots=True)
class Failed:
    """What was asked for broke: a request, or a shard."""

    kind: str  # the exception's class in errors.py
    message: str

    @classmethod
    def of(cls, error: LlmcadError) -> "Failed":
        return cls(type(error).__name__, str(error))

    def as_error(self) -> LlmcadError:
        """The exception, to be raised; a `RuntimeFailure` where `kind` is none of ours."""
        kind = getattr(errors, self.kind, None)
        if isinstance(kind, type) and issubclass(kind, LlmcadError):
            return kind(self.message)
        return RuntimeFailure(self.message)


Event = Tokens | Provisional | DraftEnded | Finished | Failed

_SPECS = (LoaderSpec, VerifierSpec, DraftSpec)
_POLICIES = (AdaptiveConfidence, FixedDepth, FixedTree, MarginalThroughput, TokenConfidence)
_REQUESTS = (Request, Choosing, TokenLogprobs, Tokens, Provisional, DraftEnded, Finished, Failed)
_ROUNDS = (Submission, Drafting, DraftOrder, Grown, Check, PassStats, Verdict, PassReport)
_LEASES = (AskShard, EndLease, StreamShards, Lease, ReadingProgress)
_KINDS = {
    kind.__name__: kind
    for kind in (
        *_REQUESTS,
        *_ROUNDS,
        *_LEASES,
        *_SPECS,
        *_POLICIES,
        Stats,
        Costs,
        CostModel,
        Calibration,
        Worth,
        TraceBatch,
    )
}
"""What crosses, by the name that stands in bytes and files: a class may move, its name stays."""

_TREE, _DATACLASS, _ARRAY = 1, 2, 3
_NUMBERS = re.compile(r"[<>=|][biuf][1248]")  # numpy's types that consist of bytes alone
_MOST_EXTENSIONS = 8  # inside each other; ours are three


def pack(value: Any) -> bytes:
    """Encode a message, or tuples, lists and dicts of messages."""
    return cast(bytes, msgpack.packb(value, default=_encode, strict_types=True))


def unpack(data: bytes) -> Any:
    """Decode what `pack` made; sequences come back as tuples."""
    return _unpack(0, data)


def unpack_stream(file: BinaryIO) -> Iterator[Any]:
    """One value after the other, as `pack` made them, from the start of a file, which may hold anything.

    Raises ValueError where a value is cut short or none of ours. What is allocated is borne out by the file's bytes.
    """
    data = file.read()
    scanner, start = _scanner(data), 0
    while start < len(data):
        try:
            scanner.skip()
            end = scanner.tell()
            value = unpack(data[start:end])
        except msgpack.OutOfData:
            raise ValueError(f"it is cut short after byte {start:,}") from None
        except (ValueError, TypeError, ArithmeticError, LookupError, AttributeError, RecursionError) as error:
            raise _unreadable(start, error) from None
        except (msgpack.UnpackException, LlmcadError) as error:
            raise _unreadable(start, error) from None
        yield value
        start = end


def _unreadable(start: int, error: Exception) -> ValueError:
    return ValueError(f"there is nothing readable at byte {start:,} ({shown(repr(error))})")


def _scanner(data: bytes) -> Any:
    """Walks over values without making them: a list's announced length is believed once its items have been seen."""
    scanner = msgpack.Unpacker(max_buffer_size=max(1, len(data)))
    scanner.feed(data)
    return scanner


def _unpack(depth: int, data: bytes) -> Any:
    """depth: of extensions around it."""
    _scanner(data).skip()
    return msgpack.unpackb(data, ext_hook=partial(_decode, depth), use_list=False, strict_map_key=False)


def _encode(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, np.integer | np.floating | np.bool_):
        return value.item()
    if isinstance(value, frozenset):
        return sorted(value)
    if isinstance(value, np.ndarray):
        body = [value.dtype.str, list(value.shape), value.tobytes()]
        return msgpack.ExtType(_ARRAY, msgpack.packb(body))
    if isinstance(value, TokenTree):
        return msgpack.ExtType(_TREE, pack([value.tokens, value.parents, value.logprobs]))
    if type(value) is _KINDS.get(type(value).__name__):
        fields = [getattr(value, field.name) for field in dataclasses.fields(value) if field.init]
        return msgpack.ExtType(_DATACLASS, pack([type(value).__name__, *fields]))
    raise TypeError(f"{type(value).__name__} does not cross processes")


def _decode(depth: int, code: int, data: bytes) -> Any:
    if depth >= _MOST_EXTENSIONS:
        raise ValueError(f"more than {_MOST_EXTENSIONS} values inside each other")
    body = _unpack(depth + 1, data)
    if not isinstance(body, tuple) or not body:
        raise ValueError("an extension without parts")
    if code == _ARRAY:
        return _array(*body)
    if code == _TREE:
        return TokenTree.build(*body)
    if code == _DATACLASS:
        return _message_class(body[0])(*body[1:])
    raise ValueError(f"an extension of kind {code}")


def _array(dtype: Any, shape: Any, raw: Any) -> np.ndarray:
    if not (isinstance(dtype, str) and _NUMBERS.fullmatch(dtype) and isinstance(raw, bytes)):
        raise ValueError(f"an array of {quoted(dtype)}")
    if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"an array of shape {quoted(shape)}")
    if math.prod(shape) * np.dtype(dtype).itemsize != len(raw):
        raise ValueError(f"an array of shape {quoted(shape)} in {len(raw):,} bytes")
    return np.frombuffer(raw, dtype=dtype).reshape(shape)


def _message_class(name: Any) -> Any:
    """Older traces name the module too."""
    kind = _KINDS.get(name.rpartition(":")[2]) if isinstance(name, str) else None
    if kind is None:
        raise ValueError(f"{quoted(name)} is not a message")
    return kind
