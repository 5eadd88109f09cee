"""The loader: reads shards from disk ahead of the verifier, in a circle, within its byte budget.

A shard is read in pieces (runs of tensors that lie together in the file), each piece into a reusable aligned
buffer and from there into the object store; putting realigns every tensor to 64 bytes. While piece k is being put,
piece k + 1 is being read. The loader never holds more bytes in the store than its window. It knows byte ranges
only: no torch, no model.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray

from llmcad_actors.config import LoaderSpec
from llmcad_actors.core.budget import NUM_READ_BUFFERS
from llmcad_actors.core.trace import Recorder
from llmcad_actors.errors import DeadlineError, LlmcadError, OverBudgetError, RuntimeFailure, StorageError
from llmcad_actors.messages import Progress, pack, unpack
from llmcad_actors.storage.checkpoint import Checkpoint, TensorInfo
from llmcad_actors.storage.layout import ShardSpec, layout_of
from llmcad_actors.storage.pieces import Piece, pieces_of
from llmcad_actors.storage.reader import AlignedBuffer, ParallelReader, PendingRead, TokenBucket, buffer_bytes

NUM_BUFFERS = NUM_READ_BUFFERS
READ_TIMEOUT_S = 120.0

Put = Callable[[dict[str, np.ndarray]], Any]
"""Stores the tensors of a piece (uint8 arrays by name) and returns a reference; dropping it frees them."""


@dataclass
class _Shard:
    spec: ShardSpec
    lease: int
    refs: list[Any] = field(default_factory=list)
    nbytes: int = 0


class Loader:
    """Reads a prelude of shards once, then a cycle of shards for ever."""

    def __init__(
        self,
        *,
        window_bytes: int,
        piece_bytes: int,
        reader: ParallelReader,
        put: Put,
        read_ahead: bool = True,
        recorder: Recorder | None = None,
    ) -> None:
        """`read_ahead`: False reads a shard only once it is asked for and no lease is out."""
        self._read_ahead = read_ahead
        self._num_waiting = 0  # calls of `next`
        self._num_given = 0
        self._recorder = recorder or Recorder("loader", time.monotonic)
        self._window = window_bytes
        self._piece_bytes = piece_bytes
        self._reader = reader
        self._put = put
        self._state = threading.Condition()
        self._ready: deque[_Shard] = deque()
        self._leased: dict[int, _Shard] = {}
        self._held = 0  # bytes in the store, and those on their way there
        self._closed = False
        self._error: LlmcadError | None = None
        self._threads: list[threading.Thread] = []
        self._buffers: deque[AlignedBuffer] = deque()
        self._pending: deque[tuple[_Shard, Piece, AlignedBuffer, PendingRead, bool]] = deque()
        self._cycle: tuple[ShardSpec, ...] = ()
        self._last: _Shard | None = None

    def start(self, prelude: Sequence[ShardSpec], cycle: Sequence[ShardSpec]) -> None:
        """Begin to read: `prelude` once, then `cycle` round and round (an empty cycle ends the reading)."""
        largest = max((spec.nbytes for spec in (*prelude, *cycle)), default=0)
        if largest > self._window:
            raise OverBudgetError(f"a shard of {largest} bytes does not fit the window of {self._window}")
        self._cycle = tuple(cycle)
        pieces = [p for s in (*prelude, *cycle) for p in pieces_of(s, self._piece_bytes)]
        size = buffer_bytes(max((piece.nbytes for piece in pieces), default=1))
        self._buffers.extend(AlignedBuffer(size, populate=True) for _ in range(NUM_BUFFERS))
        for work in (lambda: self._feed(_schedule(prelude, cycle)), self._store):
            thread = threading.Thread(target=self._guarded, args=(work,), daemon=True)
            thread.start()
            self._threads.append(thread)

    def next(self, timeout_s: float) -> tuple[int, str, list[Any]]:
        """Lease the next shard: (lease id, shard name, one reference per piece)."""
        with self._state:
            self._num_waiting += 1
            self._state.notify_all()
            try:
                self._wait(lambda: bool(self._ready), timeout_s, "the next shard")
            finally:
                self._num_waiting -= 1
            shard = self._ready.popleft()
            self._num_given += 1
            self._leased[shard.lease] = shard
            self._last = shard
            return shard.lease, shard.spec.name, list(shard.refs)

    def release(self, lease: int) -> None:
        """End a lease; its bytes may be used again."""
        with self._state:
            shard = self._leased.pop(lease)
            shard.refs.clear()
            self._held -= shard.nbytes
            self._state.notify_all()

    def progress(self) -> Progress:
        with self._state:
            name = self._last.spec.name if self._last else ""
        index = next((i for i, spec in enumerate(self._cycle) if spec.name == name), 0)
        return Progress(name, index, len(self._cycle), self._reader.bytes_read, self._reader.busy_s)

    def close(self) -> None:
        """Stop reading, end all leases, join the threads."""
        with self._state:
            self._closed = True
            self._state.notify_all()
        for thread in self._threads:
            thread.join(READ_TIMEOUT_S)
        self._reader.close()
        self._ready.clear()
        self._leased.clear()

    @property
    def held_bytes(self) -> int:
        return self._held

    def _wait(self, ready: Callable[[], bool], timeout_s: float, what: str) -> None:
        done = self._state.wait_for(lambda: ready() or self._error is not None or self._closed, timeout_s)
        if self._error is not None:
            raise self._error
        if self._closed:
            raise StorageError("the loader is closed")
        if not done:
            raise DeadlineError(f"{what} did not come within {timeout_s:.0f} s")

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except _ClosedError:
            pass
        except LlmcadError as error:
            self._fail(error)
        except Exception as error:  # a thread's outermost method: whoever waits for a shard must hear of it
            self._fail(RuntimeFailure(f"the loader broke: {error!r}"))

    def _fail(self, error: LlmcadError) -> None:
        with self._state:
            self._error = error
            self._state.notify_all()

    def _feed(self, schedule: Iterator[ShardSpec]) -> None:
        """Submit the reads of piece after piece, each when window and buffers have room."""
        for lease, spec in enumerate(schedule):
            shard = _Shard(spec, lease)
            pieces = pieces_of(spec, self._piece_bytes)
            self._await_demand(lease)
            for piece in pieces:
                buffer = self._take_room(piece.nbytes)
                shard.nbytes += piece.nbytes
                pending = self._reader.submit(piece.file, piece.offset, piece.nbytes, buffer)
                with self._state:
                    self._pending.append((shard, piece, buffer, pending, piece is pieces[-1]))
                    self._state.notify_all()

    def _await_demand(self, lease: int) -> None:
        """Without read-ahead, a shard's turn comes when it is waited for and the one before is done with."""

        def is_due() -> bool:
            return self._num_waiting > 0 and self._num_given == lease and not self._leased

        if not self._read_ahead:
            with self._state:
                self._state.wait_for(lambda: self._closed or is_due())

    def _take_room(self, nbytes: int) -> AlignedBuffer:
        with self._state:
            self._state.wait_for(lambda: self._closed or (self._buffers and self._held + nbytes <= self._window))
            if self._closed:
                raise _ClosedError
            self._held += nbytes
            return self._buffers.popleft()

    def _store(self) -> None:
        """Put finished pieces into the store, in order; a shard is ready with its last piece."""
        while True:
            with self._state:
                self._state.wait_for(lambda: self._closed or bool(self._pending))
                if self._closed:
                    return
                shard, piece, buffer, pending, is_last = self._pending.popleft()
            data = pending.wait(READ_TIMEOUT_S)
            self._recorder.add("read", pending.began, pending.ended, shard=shard.spec.name, bytes=piece.nbytes)
            started = self._recorder.now()
            ref = self._put({info.name: _part(data, piece, info) for info in piece.tensors})
            self._recorder.add("put", started, shard=shard.spec.name, bytes=piece.nbytes)
            with self._state:
                shard.refs.append(ref)
                del ref  # the shard's is the only one: dropping that frees the bytes
                self._buffers.append(buffer)
                if is_last:
                    self._ready.append(shard)
                self._state.notify_all()


class _ClosedError(Exception):
    pass


def _schedule(prelude: Sequence[ShardSpec], cycle: Sequence[ShardSpec]) -> Iterator[ShardSpec]:
    yield from prelude
    while cycle:
        yield from cycle


def _part(data: np.ndarray, piece: Piece, info: TensorInfo) -> np.ndarray:
    start = info.offset - piece.offset
    return data[start : start + info.nbytes]


class LoaderActor:
    """The loader behind an actor. `next` may wait while `release` and `progress` are served: a threaded actor."""

    def __init__(self, spec: bytes) -> None:
        setup: LoaderSpec = unpack(spec)
        layout = layout_of(Checkpoint.open(Path(setup.path)))
        limit = TokenBucket(setup.rate_limit) if setup.rate_limit else None
        reader = ParallelReader(setup.threads, setup.chunk_bytes, limit)
        pinned = set(setup.pinned)
        self._prelude = [spec for spec in layout.shards if spec.name in pinned]
        self._cycle = [spec for spec in layout.shards if spec.name not in pinned]
        self._recorder = Recorder("loader", time.monotonic)
        self._loader = Loader(
            window_bytes=setup.window_bytes,
            piece_bytes=setup.piece_bytes,
            reader=reader,
            put=ray.put,
            read_ahead=setup.read_ahead,
            recorder=self._recorder,
        )

    def start(self) -> None:
        self._loader.start(self._prelude, self._cycle)

    def next(self, timeout_s: float) -> tuple[int, str, list[Any]]:
        return self._loader.next(timeout_s)

    def release(self, lease: int) -> None:
        self._loader.release(lease)

    def progress(self) -> bytes:
        return pack(self._loader.progress())

    def trace(self, keep_on: bool) -> bytes:
        """What was recorded since the last call; record on, or stop."""
        return pack(self._recorder.drain(keep_on=keep_on))
