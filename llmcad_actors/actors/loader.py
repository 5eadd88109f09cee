"""The loader: reads shards from disk ahead of the verifier, in a circle, within its byte budget.

A shard is read in extents (runs of tensors that lie together in the file), straight into the window: memory that the
verifier shares. It lends shards by name and reads on as leases end, so it never holds more than the window. It
knows byte ranges only: no torch, no model.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from llmcad_actors.actors.arena import Arena
from llmcad_actors.actors.channel import Address, LeaseServer
from llmcad_actors.actors.schedule import Schedule
from llmcad_actors.config import LoaderSpec
from llmcad_actors.core.ring import Ring
from llmcad_actors.core.trace import Recorder
from llmcad_actors.errors import ActorFailure, DeadlineError, LlmcadError, OverBudgetError, RuntimeFailure, StorageError
from llmcad_actors.messages import Lease, Place, ReadingProgress, pack, unpack
from llmcad_actors.storage.checkpoint import Checkpoint
from llmcad_actors.storage.direct import BLOCK
from llmcad_actors.storage.extents import Extent, extents_of, room_bytes
from llmcad_actors.storage.layout import ShardSpec, layout_of
from llmcad_actors.storage.reader import AlignedBuffer, ParallelReader, PendingRead, TokenBucket, span_bytes

READ_TIMEOUT_S = 120.0
LEND_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class _Read:
    """An extent on its way, or there."""

    extent: Extent
    position: int  # in the window
    pending: PendingRead

    def places(self) -> Iterator[Place]:
        start = self.position + self.extent.offset % BLOCK
        for info in self.extent.tensors:
            yield info.name, start + info.offset - self.extent.offset, info.nbytes


@dataclass
class _Shard:
    spec: ShardSpec
    lease: int
    reads: list[_Read] = field(default_factory=list)


class Loader:
    """Reads a prelude of shards once, then a pass's streamed shards in a circle, and lends them by name.

    What is asked for is the next that has been read, as a rule. If it is not, what has been read before it is dropped;
    and where it is not on its way, reading begins anew with it.
    """

    def __init__(
        self,
        *,
        window: AlignedBuffer,
        extent_bytes: int,
        reader: ParallelReader,
        read_ahead: bool = True,
        recorder: Recorder | None = None,
    ) -> None:
        """`read_ahead`: False reads a shard only once it is asked for and no lease is out."""
        self._read_ahead = read_ahead
        self._is_awaited = False  # a shard, by `lend`
        self._recorder = recorder or Recorder("loader", time.monotonic)
        self._window = window
        self._ring = Ring(window.size)
        self._extent_bytes = extent_bytes
        self._reader = reader
        self._state = threading.Condition()
        self._coming: str | None = None  # its reads are being submitted
        self._submitted: deque[_Shard] = deque()
        self._leased: dict[int, _Shard] = {}
        self._closed = False
        self._error: LlmcadError | None = None
        self._thread: threading.Thread | None = None
        self._specs: dict[str, ShardSpec] = {}
        self._schedule = Schedule((), (), ())
        self._last = ""  # the shard that was lent last

    def start(
        self,
        prelude: Sequence[ShardSpec],
        circle: Sequence[ShardSpec],
        *,
        encoder: Sequence[ShardSpec] = (),
        streamed: Sequence[str] | None = None,
    ) -> None:
        """Begin to read: `prelude` once, then what is streamed of `encoder`, then of `circle` round and round.

        The encoder comes again when it is asked for. streamed: default all of both.
        """
        self._specs = {spec.name: spec for spec in (*prelude, *encoder, *circle)}
        names = [[spec.name for spec in specs] for specs in (prelude, encoder, circle)]
        chosen = (*names[1], *names[2]) if streamed is None else tuple(streamed)
        self._check_room([self._specs[name] for name in {*names[0], *chosen}])
        self._schedule = Schedule(*names)
        self._schedule.stream(chosen)
        self._thread = threading.Thread(target=self._guarded, daemon=True)
        self._thread.start()

    def stream(self, names: Sequence[str]) -> None:
        """From the next shard on read these, in the order of the pass. What has been read ahead stays as it is."""
        with self._state:
            self._schedule.stream(names)
            self._state.notify_all()

    def lend(self, name: str, timeout_s: float = LEND_TIMEOUT_S) -> Lease:
        """Lease a shard. One call at a time. Raises `ActorFailure` where it is not in the schedule."""
        deadline = time.monotonic() + timeout_s
        self._turn_to(name)
        try:
            while (shard := self._take_shard(deadline, f"shard {name}", timeout_s)).spec.name != name:
                self.release(shard.lease)
        finally:
            self._is_awaited = False
        self._last = name
        return Lease(shard.lease, name, tuple(place for read in shard.reads for place in read.places()))

    def release(self, number: int) -> None:
        """End a lease; its bytes will be written over."""
        with self._state:
            for read in self._leased.pop(number).reads:
                self._ring.give_back(read.position)
            self._state.notify_all()

    def progress(self) -> ReadingProgress:
        with self._state:
            index, count = self._schedule.place_of(self._last)
        return ReadingProgress(self._last, index, count, self._reader.bytes_read, self._reader.busy_s)

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

    def _check_room(self, specs: Sequence[ShardSpec]) -> None:
        rooms = (room_bytes(spec, self._extent_bytes, alone=not self._read_ahead) for spec in specs)
        needed = max(rooms, default=0)
        if needed > self._window.size:
            raise OverBudgetError(f"a shard that takes {needed} bytes does not fit the window of {self._window.size}")

    def _turn_to(self, name: str) -> None:
        """See to it that the shard comes, if it is not on its way."""
        with self._state:
            on_its_way = [self._coming, *(shard.spec.name for shard in self._submitted)]
            if name not in on_its_way and not self._schedule.turn_to(name):
                raise ActorFailure(f"the loader has no shard {name} in its schedule")
            self._is_awaited = True
            self._state.notify_all()

    def _take_shard(self, deadline: float, what: str, timeout_s: float) -> _Shard:
        """The next that has been read, which counts as leased."""
        with self._state:
            left_s = max(0.0, deadline - time.monotonic())
            if not self._wait(lambda: bool(self._submitted), left_s):
                raise DeadlineError(f"{what} did not come within {timeout_s:.0f} s")
            shard = self._submitted[0]
        try:
            for read in shard.reads:
                read.pending.wait(max(0.0, deadline - time.monotonic()))
        except StorageError as error:
            self._fail(error)
            raise
        with self._state:
            self._submitted.popleft()
            self._leased[shard.lease] = shard
        for read in shard.reads:
            began, ended = read.pending.began, read.pending.ended
            self._recorder.add("read", began, ended, shard=shard.spec.name, bytes=read.extent.nbytes)
        return shard

    def _wait(self, ready: Callable[[], bool], timeout_s: float) -> bool:
        done = self._state.wait_for(lambda: ready() or self._error is not None or self._closed, timeout_s)
        if self._error is not None:
            raise self._error
        if self._closed:
            raise StorageError("the loader is closed")
        return done

    def _guarded(self) -> None:
        try:
            self._feed()
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

    def _feed(self) -> None:
        """Submit the reads of extent after extent, each when the window has room."""
        for lease in count():
            shard = _Shard(self._next_spec(), lease)
            for extent in extents_of(shard.spec, self._extent_bytes):
                position = self._take_room(span_bytes(extent.offset, extent.nbytes))
                pending = self._reader.submit(extent.file, extent.offset, extent.nbytes, self._window, position)
                shard.reads.append(_Read(extent, position, pending))
            with self._state:
                self._coming = None
                self._submitted.append(shard)
                self._state.notify_all()

    def _next_spec(self) -> ShardSpec:
        """What is to be read now; waits until there is something."""
        with self._state:
            self._state.wait_for(lambda: self._closed or (self._schedule.has_next() and self._is_due()))
            if self._closed:
                raise _ClosedError
            self._coming = self._schedule.take()
            return self._specs[self._coming]

    def _is_due(self) -> bool:
        """Without read-ahead, a shard's turn comes when it is waited for and the one before is done with."""
        return self._read_ahead or (self._is_awaited and not self._submitted and not self._leased)

    def _take_room(self, nbytes: int) -> int:
        with self._state:
            while not self._closed:
                position = self._ring.take(nbytes)
                if position is not None:
                    return position
                self._state.wait()
        raise _ClosedError


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
        self._encoder, self._circle = layout.encoder, (*layout.layers, *layout.head)
        self._prelude = [spec for spec in layout.shards if spec.name in pinned]
        self._streamed = [spec.name for spec in layout.shards if spec.name not in pinned]
        self._recorder = Recorder("loader", time.monotonic)
        self._arena = Arena(setup.window_bytes)
        self._loader = Loader(
            window=self._arena.buffer,
            extent_bytes=setup.extent_bytes,
            reader=reader,
            read_ahead=setup.read_ahead,
            recorder=self._recorder,
        )
        self._leases = LeaseServer(self._loader)

    def arena(self) -> tuple[list[Any], int]:
        """The window, to be `mapped`."""
        return self._arena.handle()

    def leases(self) -> Address:
        """Where a `LeaseClient` asks for shards."""
        return self._leases.address

    def start(self) -> None:
        self._loader.start(self._prelude, self._circle, encoder=self._encoder, streamed=self._streamed)

    def progress(self) -> bytes:
        return pack(self._loader.progress())

    def trace(self, goes_on: bool) -> bytes:
        """What was recorded since the last call; recording goes on, or stops."""
        return pack(self._recorder.drain(goes_on=goes_on))
