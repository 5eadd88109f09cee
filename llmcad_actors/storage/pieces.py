"""How a shard is read: in pieces, each one run of bytes of one file."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llmcad_actors.storage.checkpoint import TensorInfo
from llmcad_actors.storage.direct import span_bytes
from llmcad_actors.storage.layout import ShardSpec

MAX_GAP_BYTES = 64 << 10
"""Tensors further apart than this are not read in one go: the bytes between them would be read for nothing."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Tensors that are read by one request, and the byte range that covers them."""

    file: Path
    offset: int
    nbytes: int
    tensors: tuple[TensorInfo, ...]


def pieces_of(spec: ShardSpec, piece_bytes: int) -> tuple[Piece, ...]:
    """The shard's tensors in file order, grouped into runs of at most `piece_bytes` (a larger tensor is alone)."""
    return tuple(_piece(run) for run in _runs(spec.tensors, piece_bytes))


def room_bytes(spec: ShardSpec, piece_bytes: int, *, alone: bool = False) -> int:
    """What a window needs to be able to take the shard, whatever lies where; or with nothing else in it (`alone`).

    Every piece widened to whole blocks, and as much as the largest of them: a piece that does not fit behind the
    others begins anew at the window's start. Alone, all of them fit behind each other.
    """
    spans = [span_bytes(piece.offset, piece.nbytes) for piece in pieces_of(spec, piece_bytes)]
    return sum(spans) + (0 if alone else max(spans, default=0))


def _runs(tensors: tuple[TensorInfo, ...], piece_bytes: int) -> Iterator[list[TensorInfo]]:
    run: list[TensorInfo] = []
    for info in sorted(tensors, key=lambda t: (str(t.file), t.offset)):
        if run and not _joins(run, info, piece_bytes):
            yield run
            run = []
        run.append(info)
    if run:
        yield run


def _joins(run: list[TensorInfo], info: TensorInfo, piece_bytes: int) -> bool:
    last = run[-1]
    gap = info.offset - (last.offset + last.nbytes)
    span = info.offset + info.nbytes - run[0].offset
    return info.file == last.file and 0 <= gap <= MAX_GAP_BYTES and span <= piece_bytes


def _piece(run: list[TensorInfo]) -> Piece:
    start = run[0].offset
    return Piece(run[0].file, start, run[-1].offset + run[-1].nbytes - start, tuple(run))
