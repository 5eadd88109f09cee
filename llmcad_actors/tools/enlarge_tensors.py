"""What stands where in the tensors of an enlarged Llama model, so that it computes exactly what the source computes.

Each axis of a tensor is a row of segments:

    REAL    the source's channels, heads or FFN rows
    SHADOW  extra query heads that share a real head's keys and values: their output is not zero
    EXTRA   everything else that was added: hidden channels that stay 0, heads and FFN rows whose output is 0

and each pair of segments holds the source's values, zeros, or noise. The residual stream's extra channels are 0:
the embedding's are, and nothing adds to them. An extra head or FFN row outputs 0 because its v_proj (up_proj) row is
0 on the real channels and the extra channels are 0 themselves; so its o_proj (down_proj) column may hold anything.
An added layer consists of extra heads and rows only, and adds exact zeros.

RMSNorm divides by the mean over more channels: weight' = weight * sqrt(d / d'), eps' = eps * d / d' undo it. (In
bf16 that product is rounded, like any weight; it is exact when d' / d is a power of 4.)
"""

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

import numpy as np

from llmcad_actors.storage.checkpoint import TensorInfo
from llmcad_actors.storage.dtypes import STORAGE, Noise, Stored, convert, decode, encode
from llmcad_actors.storage.rows import read_bytes
from llmcad_actors.storage.safetensors_header import ITEM_BYTES
from llmcad_actors.tools.enlarge_shape import LlamaShape

BLOCK_BYTES = 16 << 20


class Kind(Enum):
    """What a stretch of an axis is."""

    REAL = "real"
    SHADOW = "shadow"
    EXTRA = "extra"


@dataclass(frozen=True, slots=True)
class Segment:
    """Positions [start, stop) of an axis; a real one begins at `origin` in the source."""

    kind: Kind
    start: int
    stop: int
    origin: int = 0


Axis = tuple[Segment, ...]
Zeros = frozenset[tuple[Kind, Kind]]  # pairs (row kind, column kind) that are zero

NONE: Zeros = frozenset()
# Rows of v_proj and up_proj that must output 0.
SILENT_ROWS: Zeros = frozenset({(Kind.EXTRA, Kind.REAL)})
# o_proj and down_proj: nothing real reaches an extra channel, and shadow heads reach nothing at all.
QUIET_CHANNELS: Zeros = frozenset({(Kind.EXTRA, Kind.REAL), (Kind.REAL, Kind.SHADOW), (Kind.EXTRA, Kind.SHADOW)})
ZERO_COLUMNS: Zeros = frozenset({(Kind.REAL, Kind.EXTRA)})  # the embedding


@dataclass(frozen=True, slots=True)
class EnlargedTensor:
    """One tensor of the result: its axes, which parts are zero, and where the real part comes from."""

    name: str
    rows: Axis
    columns: Axis | None = None  # None: a vector
    zeros: Zeros = NONE
    source: TensorInfo | None = None  # None: a tensor of an added layer
    scale: float = 1.0  # of the real part

    @property
    def shape(self) -> tuple[int, ...]:
        axes = (self.rows,) if self.columns is None else (self.rows, self.columns)
        return tuple(axis[-1].stop for axis in axes)

    def blocks(self, dtype: str, seed: int) -> Iterator[Stored]:
        """The tensor from top to bottom, in blocks of whole rows of about 16 MiB."""
        noise = Noise(seed, zlib.crc32(self.name.encode()))
        count, width = self.shape[0], math.prod(self.shape[1:])
        step = max(1, BLOCK_BYTES // (width * ITEM_BYTES[dtype]))
        for start in range(0, count, step):
            stop = min(start + step, count)
            block = noise.take((stop - start, width), dtype)
            for segment in self.rows:
                self._fill(block, _cut(segment, start, stop), start, dtype)
            yield block if self.columns is not None else block.reshape(-1)

    def _fill(self, block: Stored, rows: Segment, start: int, dtype: str) -> None:
        """Put zeros and the source's values into `block`, whose first row is `start`."""
        if rows.start >= rows.stop:
            return
        out = block[rows.start - start : rows.stop - start]
        values = self._read(rows, dtype)
        for column in self.columns or (Segment(Kind.REAL, 0, 1),):
            here = slice(column.start, column.stop)
            if (rows.kind, column.kind) in self.zeros:
                out[:, here] = 0
            elif values is not None and column.kind is Kind.REAL:
                out[:, here] = values[:, column.origin : column.origin + column.stop - column.start]

    def _read(self, rows: Segment, dtype: str) -> Stored | None:
        """The source's rows, [rows, source width]."""
        if self.source is None or rows.kind is not Kind.REAL:
            return None
        info = self.source.rows(rows.origin, rows.origin + rows.stop - rows.start)
        stored = read_bytes(info).view(STORAGE[info.dtype]).reshape(info.shape[0], -1)
        if self.scale == 1.0:
            return convert(stored, info.dtype, dtype)
        return encode(decode(stored, info.dtype) * np.float32(self.scale), dtype)


def _cut(segment: Segment, start: int, stop: int) -> Segment:
    """The part of a segment within [start, stop); empty when start >= stop in the result."""
    begin = max(segment.start, start)
    return Segment(segment.kind, begin, min(segment.stop, stop), segment.origin + begin - segment.start)


def _padded(real: int, total: int) -> Axis:
    """`real` positions as they are, then extra ones."""
    extra = (Segment(Kind.EXTRA, real, total),) if total > real else ()
    return (Segment(Kind.REAL, 0, real), *extra)


def _query_axis(old: LlamaShape, new: LlamaShape) -> Axis:
    """Real head j of key/value group i stays in group i, whose surplus heads are shadows."""
    segments: list[Segment] = []
    real, whole = old.group * old.head_dim, new.group * new.head_dim
    for group in range(old.kv_heads):
        start = group * whole
        segments.append(Segment(Kind.REAL, start, start + real, group * real))
        segments.append(Segment(Kind.SHADOW, start + real, start + whole))
    segments.append(Segment(Kind.EXTRA, old.kv_heads * whole, new.kv_heads * whole))
    return tuple(s for s in segments if s.stop > s.start)


class TensorPlan:
    """The tensors of the enlarged model, in the order in which they are written."""

    def __init__(self, old: LlamaShape, new: LlamaShape) -> None:
        self.old, self.new = old, new
        self._hidden = _padded(old.hidden, new.hidden)
        self._norm_scale = math.sqrt(old.hidden / new.hidden)

    def tensors(self, source: dict[str, TensorInfo]) -> Iterator[EnlargedTensor]:
        """`source`: the source's tensors by parameter name."""
        vocab = _padded(self.old.vocab, self.new.vocab)
        name = "model.embed_tokens.weight"
        yield EnlargedTensor(name, vocab, self._hidden, ZERO_COLUMNS, source[name])
        origins = real_layers(self.old.layers, self.new.layers)
        for index in range(self.new.layers):
            yield from self._layer(index, origins.get(index), source)
        yield self._norm("model.norm.weight", source["model.norm.weight"])
        if not self.new.tied:
            name = "lm_head.weight"
            yield EnlargedTensor(name, vocab, self._hidden, NONE, source[name])

    def _layer(self, index: int, origin: int | None, source: dict[str, TensorInfo]) -> Iterator[EnlargedTensor]:
        prefix = f"model.layers.{index}."
        for leaf, (rows, columns, zeros) in self._matrices(origin is not None).items():
            info = None if origin is None else source[f"model.layers.{origin}.{leaf}.weight"]
            yield EnlargedTensor(f"{prefix}{leaf}.weight", rows, columns, zeros, info)
        for leaf in ("input_layernorm", "post_attention_layernorm"):
            info = None if origin is None else source[f"model.layers.{origin}.{leaf}.weight"]
            yield self._norm(f"{prefix}{leaf}.weight", info)

    def _matrices(self, is_real: bool) -> dict[str, tuple[Axis, Axis, Zeros]]:
        """leaf -> rows, columns, zeros. Weights are [out, in]."""
        hidden, old, new = self._hidden, self.old, self.new
        if is_real:
            q = _query_axis(old, new)
            kv = _padded(old.kv_heads * old.head_dim, new.kv_heads * new.head_dim)
            ffn = _padded(old.intermediate, new.intermediate)
        else:
            sizes = (new.heads * new.head_dim, new.kv_heads * new.head_dim, new.intermediate)
            q, kv, ffn = ((Segment(Kind.EXTRA, 0, size),) for size in sizes)
        return {
            "self_attn.q_proj": (q, hidden, NONE),
            "self_attn.k_proj": (kv, hidden, NONE),
            "self_attn.v_proj": (kv, hidden, SILENT_ROWS),
            "self_attn.o_proj": (hidden, q, QUIET_CHANNELS),
            "mlp.gate_proj": (ffn, hidden, NONE),
            "mlp.up_proj": (ffn, hidden, SILENT_ROWS),
            "mlp.down_proj": (hidden, ffn, QUIET_CHANNELS),
        }

    def _norm(self, name: str, info: TensorInfo | None) -> EnlargedTensor:
        return EnlargedTensor(name, self._hidden, source=info, scale=self._norm_scale)


def real_layers(old: int, new: int) -> dict[int, int]:
    """Position -> source layer: the real layers spread evenly among the added ones."""
    return {layer * new // old: layer for layer in range(old)}
