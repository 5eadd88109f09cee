"""The loader: reads shards from disk ahead of the verifier, in a circle, within its byte budget.

A shard is read in pieces (runs of tensors that lie together in the file), straight into the window: memory that the
verifier shares. It lends shards in order and reads on as leases end, so it never holds more than the window. It
knows byte ranges only: no torch, no model.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from llmcad_actors.actors.arena import Arena
from llmcad_actors.actors.channel import LEND_TIMEOUT_S, Address, Lease, LeaseServer, Place
from llmcad_actors.config import LoaderSpec
from llmcad_actors.core.ring import Ring
from llmcad_actors.core.trace import Recorder
from llmcad_actors.errors import DeadlineError, LlmcadError, OverBudgetError, RuntimeFailure, StorageError
from llmcad_actors.messages import Progress, pack, unpack
from llmcad_actors.storage.checkpoint import Checkpoint
from llmcad_actors.storage.direct import BLOCK
from llmcad_actors.storage.layout import ShardSpec, layout_of
from llmcad_actors.storage.pieces import Piece, pieces_of, room_bytes
from llmcad_actors.storage.reader import AlignedBuffer, ParallelReader, PendingRead, TokenBucket, span_bytes

READ_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class _Read:
    """A piece on its way, or there."""

    piece: Piece
    position: int  # in the window
    pending: PendingRead

    def places(self) -> Iterator[Place]:
        start = self.position + self.piece.offset % BLOCK
        for info in self.piece.tensors:
            yield info.name, start + info.offset - self.piece.offset, info.nbytes


@dataclass
class _Shard:
    spec: ShardSpec
    lease: int
    reads: list[_Read] = field(default_factory=list)


class Loader:
    """Reads a prelude of shards once, then a cycle of shards for ever; before it, when asked to, an opening.

    The opening is what only a prompt's first pass needs: an encoder's shards.
    """

    def __init__(
        self,
        *,
        window: AlignedBuffer,
        piece_bytes: int,
        reader: ParallelReader,
        read_ahead: bool = True,
        recorder: Recorder | None = None,
    ) -> None:
        """`read_ahead`: False reads a shard only once it is asked for and no lease is out."""
        self._read_ahead = read_ahead
        self._num_waiting = 0  # calls of `next`
        self._num_given = 0
        self._recorder = recorder or Recorder("loader", time.monotonic)
        self._window = window
        self._ring = Ring(window.size)
        self._piece_bytes = piece_bytes
        self._reader = reader
        self._state = threading.Condition()
        self._submitted: deque[_Shard] = deque()
        self._leased: dict[int, _Shard] = {}
        self._closed = False
        self._error: LlmcadError | None = None
        self._thread: threading.Thread | None = None
        self._cycle: tuple[ShardSpec, ...] = ()
        self._opening: tuple[ShardSpec, ...] = ()
        self._order: tuple[ShardSpec, ...] = ()
        self._is_opening_due = False  # the schedule has yet to turn to it
        self._is_opening_ahead = False  # due, or on its way: its first shard has not been lent
        self._last: _Shard | None = None

    def start(
        self,
        prelude: Sequence[ShardSpec],
        cycle: Sequence[ShardSpec],
        opening: Sequence[ShardSpec] = (),
        order: Sequence[ShardSpec] = (),
    ) -> None:
        """Begin to read: `prelude` once, `opening`, then `cycle` round and round (nothing while it is empty).

        order: all shards of which `stream` may choose others for the cycle; default: those of the cycle.
        """
        specs = (*prelude, *opening, *cycle)
        alone = not self._read_ahead
        needed = max((room_bytes(spec, self._piece_bytes, alone=alone) for spec in specs), default=0)
        if needed > self._window.size:
            raise OverBudgetError(f"a shard that takes {needed} bytes does not fit the window of {self._window.size}")
        self._cycle, self._opening, self._order = tuple(cycle), tuple(opening), tuple(order or cycle)
        self._is_opening_due = self._is_opening_ahead = bool(opening)
        self._thread = threading.Thread(target=self._guarded, args=(self._schedule(tuple(prelude)),), daemon=True)
        self._thread.start()

    def open(self) -> None:
        """Turn to the opening, and then to the cycle's beginning. Shards that were read ahead are lent before it.

        Nothing changes while the opening's first shard is still to be lent.
        """
        with self._state:
            if not self._is_opening_ahead:
                self._is_opening_due = self._is_opening_ahead = True
                self._state.notify_all()

    def stream(self, cycle: Sequence[ShardSpec], opening: Sequence[ShardSpec] = ()) -> None:
        """From the next shard on read these, in the order of the pass. What has been read ahead stays as it is."""
        with self._state:
            self._cycle, self._opening = tuple(cycle), tuple(opening)
            self._state.notify_all()

    def next(self, timeout_s: float) -> Lease:
        """Lease the next shard. One call at a time."""
        with self._state:
            self._num_waiting += 1
            self._state.notify_all()
        try:
            return self._take_shard(time.monotonic() + timeout_s, timeout_s)
        finally:
            with self._state:
                self._num_waiting -= 1

    def release(self, lease: int) -> None:
        """End a lease; its bytes will be written over."""
        with self._state:
            for read in self._leased.pop(lease).reads:
                self._ring.give_back(read.position)
            self._state.notify_all()

    def progress(self) -> Progress:
        with self._state:
            name = self._last.spec.name if self._last else ""
        names = [[spec.name for spec in specs] for specs in (self._opening, self._cycle)]
        around = names[0] if name in names[0] else names[1]
        index = around.index(name) if name in around else 0
        return Progress(name, index, len(around), self._reader.bytes_read, self._reader.busy_s)

    def close(self) -> None:
        """Stop reading, end all leases, join the threads."""
        with self._state:
            self._closed = True
            self._state.notify_all()
        if self._thread is not None:
            self._thread.join(READ_TIMEOUT_S)
        self._reader.close()
        self._submitted.clear()
        self._leased.clear()

    @property
    def held_bytes(self) -> int:
        return self._ring.used

    def _take_shard(self, deadline: float, timeout_s: float) -> Lease:
        with self._state:
            self._wait(lambda: bool(self._submitted), timeout_s, "the next shard")
            shard = self._submitted[0]
        try:
            for read in shard.reads:
                read.pending.wait(max(0.0, deadline - time.monotonic()))
        except StorageError as error:
            self._fail(error)
            raise
        with self._state:
            self._submitted.popleft()
            self._num_given += 1
            self._leased[shard.lease] = self._last = shard
            if shard.spec in self._opening[:1]:
                self._is_opening_ahead = False
        for read in shard.reads:
            began, ended = read.pending.began, read.pending.ended
            self._recorder.add("read", began, ended, shard=shard.spec.name, bytes=read.piece.nbytes)
        return shard.lease, shard.spec.name, tuple(place for read in shard.reads for place in read.places())

    def _wait(self, ready: Callable[[], bool], timeout_s: float, what: str) -> None:
        done = self._state.wait_for(lambda: ready() or self._error is not None or self._closed, timeout_s)
        if self._error is not None:
            raise self._error
        if self._closed:
            raise StorageError("the loader is closed")
        if not done:
            raise DeadlineError(f"{what} did not come within {timeout_s:.0f} s")

    def _guarded(self, schedule: Iterator[ShardSpec]) -> None:
        try:
            self._feed(schedule)
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
        """Submit the reads of piece after piece, each when the window has room."""
        for lease, spec in enumerate(schedule):
            shard = _Shard(spec, lease)
            self._await_demand(lease)
            for piece in pieces_of(spec, self._piece_bytes):
                position = self._take_room(span_bytes(piece.offset, piece.nbytes))
                pending = self._reader.submit(piece.file, piece.offset, piece.nbytes, self._window, position)
                shard.reads.append(_Read(piece, position, pending))
            with self._state:
                self._submitted.append(shard)
                self._state.notify_all()

    def _await_demand(self, lease: int) -> None:
        """Without read-ahead, a shard's turn comes when it is waited for and the one before is done with."""

        def is_due() -> bool:
            return self._num_waiting > 0 and self._num_given == lease and not self._leased

        if not self._read_ahead:
            with self._state:
                self._state.wait_for(lambda: self._closed or is_due())

    def _take_room(self, nbytes: int) -> int:
        with self._state:
            while not self._closed:
                position = self._ring.take(nbytes)
                if position is not None:
                    return position
                self._state.wait()
        raise _ClosedError

    def _schedule(self, prelude: tuple[ShardSpec, ...]) -> Iterator[ShardSpec]:
        yield from prelude
        while True:
            yield from self._until_opening(self._due_opening())
            yield from self._until_opening(spec for spec in self._order if spec in self._cycle)

    def _until_opening(self, specs: Iterable[ShardSpec]) -> Iterator[ShardSpec]:
        for spec in specs:
            if self._is_opening_due:
                return
            yield spec

    def _due_opening(self) -> tuple[ShardSpec, ...]:
        """The opening if it is due; without a cycle, waits until it is."""
        with self._state:
            self._state.wait_for(lambda: self._closed or self._is_opening_due or bool(self._cycle))
            if self._closed:
                raise _ClosedError
            is_due, self._is_opening_due = self._is_opening_due, False
        return self._opening if is_due else ()


class _ClosedError(Exception):
    pass


class LoaderActor:
    """The loader behind an actor. It lends its shards past the actor's calls, through a `LeaseServer`."""

    def __init__(self, spec: bytes) -> None:
        setup: LoaderSpec = unpack(spec)
        layout = layout_of(Checkpoint.open(Path(setup.path)))
        limit = TokenBucket(setup.rate_limit) if setup.rate_limit else None
        reader = ParallelReader(setup.threads, setup.chunk_bytes, limit)
        pinned = set(setup.pinned)
        self._encoder, self._order = layout.encoder, (*layout.layers, *layout.head)
        self._prelude = [spec for spec in layout.shards if spec.name in pinned]
        self._opening = [spec for spec in layout.encoder if spec.name not in pinned]
        self._cycle = [spec for spec in (*layout.layers, *layout.head) if spec.name not in pinned]
        self._recorder = Recorder("loader", time.monotonic)
        self._arena = Arena(setup.window_bytes)
        self._loader = Loader(
            window=self._arena.buffer,
            piece_bytes=setup.piece_bytes,
            reader=reader,
            read_ahead=setup.read_ahead,
            recorder=self._recorder,
        )
        self._leases = LeaseServer(partial(self._loader.next, LEND_TIMEOUT_S), self._loader.release)

    def arena(self) -> tuple[list[Any], int]:
        """The window, to be `mapped`."""
        return self._arena.handle()

    def leases(self) -> Address:
        """Where a `LeaseClient` asks for shards."""
        return self._leases.address

    def start(self) -> None:
        self._loader.start(self._prelude, self._cycle, self._opening, self._order)

    def open(self) -> None:
        self._loader.open()

    def stream(self, names: Sequence[str]) -> None:
        """From now on read the shards of these names."""
        chosen = set(names)
        self._loader.stream(
            [spec for spec in self._order if spec.name in chosen],
            [spec for spec in self._encoder if spec.name in chosen],
        )

    def progress(self) -> bytes:
        return pack(self._loader.progress())

    def trace(self, keep_on: bool) -> bytes:
        """What was recorded since the last call; record on, or stop."""
        return pack(self._recorder.drain(keep_on=keep_on))
