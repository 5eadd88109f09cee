"""What crosses processes: frozen values, and their msgpack codec. No pickled classes of ours."""

import dataclasses
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import msgpack
import numpy as np

from llmcad_actors.core.stats import Stats
from llmcad_actors.core.tree import TokenTree


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to continue."""

    prompt: tuple[int, ...]
    max_new_tokens: int
    stop_tokens: tuple[int, ...]
    speculate: bool = True  # False: one token a pass, the plain baseline
    provisional: bool = True  # go on drafting while a pass runs


@dataclass(frozen=True, slots=True)
class Submission:
    """A grown tree, and what growing it took."""

    tree: TokenTree
    confidence: float  # the paper's T_c when the draft handed over
    steps: int
    drafted: int  # nodes run through the draft
    seconds: float
    head_start: bool  # provisional growth had already run the new root (a hit)


@dataclass(frozen=True, slots=True)
class Grown:
    """What a slice of provisional growth did."""

    steps: int
    drafted: int
    can_go_on: bool  # there is more to run
    late_s: float = 0.0  # the verdict waited so long for the last step to end

    def plus(self, later: "Grown") -> "Grown":
        return Grown(self.steps + later.steps, self.drafted + later.drafted, later.can_go_on)


@dataclass(frozen=True, slots=True)
class PassStats:
    """One target pass."""

    seconds: float
    stall_s: float  # waiting for shards
    compute_s: float
    rows: int  # padding included


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a pass found."""

    path: tuple[int, ...]  # accepted nodes, root to leaf
    bonus: int  # the target's own next token
    stopped: bool  # the last emitted token is a stop token
    stats: PassStats


@dataclass(frozen=True, slots=True)
class Progress:
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


@dataclass(frozen=True, slots=True)
class Provisional:
    """The draft's best guess at what comes next; replaced by the `Tokens` that follow."""

    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Finished:
    """The request's end."""

    reason: str  # "stop" | "length"
    stats: Stats


@dataclass(frozen=True, slots=True)
class Failed:
    """The request broke."""

    kind: str  # the exception's class in errors.py
    message: str


Event = Tokens | Provisional | Finished | Failed

_MODULES = ("llmcad_actors.messages", "llmcad_actors.core.", "llmcad_actors.config")
_TREE, _DATACLASS, _ARRAY = 1, 2, 3


def pack(value: Any) -> bytes:
    """Encode a message, or tuples, lists and dicts of messages."""
    return cast(bytes, msgpack.packb(value, default=_encode, strict_types=True))


def unpack(data: bytes) -> Any:
    """Decode what `pack` made; sequences come back as tuples."""
    return msgpack.unpackb(data, ext_hook=_decode, use_list=False, strict_map_key=False)


def unpack_stream(file: BinaryIO) -> Iterator[Any]:
    """One value after the other, as `pack` made them, from the start of a file.

    Raises ValueError where a value is cut short or none of ours.
    """
    values = msgpack.Unpacker(file, ext_hook=_decode, use_list=False, strict_map_key=False)
    while True:
        start = values.tell()
        try:
            value = values.unpack()
        except msgpack.OutOfData:
            if file.tell() > start:
                raise ValueError(f"it is cut short after byte {start:,}") from None
            return
        except (msgpack.UnpackException, ValueError, TypeError, AttributeError, ImportError) as error:
            raise ValueError(f"there is nothing readable at byte {start:,} ({error!r})") from None
        yield value


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
    if dataclasses.is_dataclass(value):
        kind = type(value)
        fields = [getattr(value, field.name) for field in dataclasses.fields(value) if field.init]
        return msgpack.ExtType(_DATACLASS, pack([f"{kind.__module__}:{kind.__qualname__}", *fields]))
    raise TypeError(f"{type(value).__name__} does not cross processes")


def _decode(code: int, data: bytes) -> Any:
    if code == _ARRAY:
        dtype, shape, raw = msgpack.unpackb(data)
        return np.frombuffer(raw, dtype=dtype).reshape(shape)
    body = unpack(data)
    if code == _TREE:
        tokens, parents, logprobs = body
        return TokenTree.build(tokens, parents, logprobs)
    return _message_class(body[0])(*body[1:])


def _message_class(name: str) -> Any:
    module, _, kind = name.partition(":")
    if not module.startswith(_MODULES):
        raise ValueError(f"{name} is not a message")
    return getattr(importlib.import_module(module), kind)
