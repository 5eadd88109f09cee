"""How a shard is read: in extents, each a run of bytes of one file, as file systems call it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llmcad_actors.storage.checkpoint import TensorInfo
from llmcad_actors.storage.direct import span_bytes
from llmcad_actors.storage.layout import ShardSpec

MAX_GAP_BYTES = 64 << 10
"""Tensors further apart than this are not read in one go: the bytes between them would be read for nothing."""


@dataclass(frozen=True, slots=True)
class Extent:
    """Tensors that are read by one request, and the byte range that covers them."""

    file: Path
    offset: int
    nbytes: int
    tensors: tuple[TensorInfo, ...]


def extents_of(spec: ShardSpec, extent_bytes: int) -> tuple[Extent, ...]:
    """The shard's tensors in file order, grouped into runs of at most `extent_bytes` (a larger tensor is alone)."""
    return tuple(_extent(run) for run in _runs(spec.tensors, extent_bytes))


def room_bytes(spec: ShardSpec, extent_bytes: int, *, alone: bool = False) -> int:
    """What a window needs to be able to take the shard, whatever lies where; or with nothing else in it (`alone`).

    Every extent widened to whole blocks, and as much as the largest of them: an extent that does not fit behind the
    others begins anew at the window's start. Alone, all of them fit behind each other.
    """
    spans = [span_bytes(extent.offset, extent.nbytes) for extent in extents_of(spec, extent_bytes)]
    return sum(spans) + (0 if alone else max(spans, default=0))


def _runs(tensors: tuple[TensorInfo, ...], extent_bytes: int) -> Iterator[list[TensorInfo]]:
    run: list[TensorInfo] = []
    for info in sorted(tensors, key=lambda t: (str(t.file), t.offset)):
        if run and not _joins(run, info, extent_bytes):
            yield run
            run = []
        run.append(info)
    if run:
        yield run


def _joins(run: list[TensorInfo], info: TensorInfo, extent_bytes: int) -> bool:
    last = run[-1]
    gap = info.offset - (last.offset + last.nbytes)
    span = info.offset + info.nbytes - run[0].offset
    return info.file == last.file and 0 <= gap <= MAX_GAP_BYTES and span <= extent_bytes


def _extent(run: list[TensorInfo]) -> Extent:
    start = run[0].offset
    return Extent(run[0].file, start, run[-1].offset + run[-1].nbytes - start, tuple(run))
