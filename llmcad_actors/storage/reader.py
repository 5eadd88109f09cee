"""Large reads by several threads, kept busy across the borders of what is asked.

    pending = [reader.submit(file, offset, nbytes, buffer) ...]     extents k, k + 1, ...
    bytes_k = pending[0].wait(timeout_s)                            while extent k + 1 is already being read

Extents are cut into aligned chunks, and the threads take chunks in the order submitted: the disk sees
`threads` reads at any time until the queue runs dry, wherever one extent ends and the next begins.
"""

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from llmcad_actors.errors import DeadlineError, LlmcadError, RuntimeFailure, StorageError
from llmcad_actors.storage.direct import (
    BLOCK,
    AlignedBuffer,
    Bytes,
    DirectFile,
    align_down,
    align_up,
    buffer_bytes,
    span_bytes,
)
from llmcad_actors.storage.rate import TokenBucket
from llmcad_actors.storage.rows import EmbeddingReader, read_bytes, read_rows

__all__ = [
    "AlignedBuffer",
    "Bytes",
    "DirectFile",
    "EmbeddingReader",
    "ParallelReader",
    "PendingRead",
    "TokenBucket",
    "buffer_bytes",
    "read_bytes",
    "read_rows",
    "span_bytes",
]

CHUNK_BYTES = 8 << 20


class PendingRead:
    """A read under way. Its buffer belongs to it until `done`, also after a DeadlineError."""

    def __init__(self, file: Path, wanted: Bytes, num_chunks: int, clock: Callable[[], float]) -> None:
        self.file = file
        self.began = self.ended = clock()  # when the first thread took it up, and when the last was through
        self._clock = clock
        self._is_taken = False
        self._wanted = wanted
        self._left = num_chunks
        self._error: LlmcadError | None = None
        self._lock = threading.Lock()
        self._settled = threading.Event()
        if not num_chunks:
            self._settled.set()

    @property
    def done(self) -> bool:
        """No thread touches the buffer any more (also when the read failed)."""
        return self._settled.is_set()

    @property
    def failed(self) -> bool:
        return self._error is not None

    def wait(self, timeout_s: float) -> Bytes:
        """The bytes asked for, a view of the buffer.

        Raises StorageError on I/O errors (once no thread touches the buffer any more), DeadlineError,
        RuntimeFailure when the reader was closed meanwhile.
        """
        if not self._settled.wait(timeout_s):
            raise DeadlineError(f"reading {self._wanted.nbytes:,} bytes of {self.file} took over {timeout_s} s")
        if self._error is not None:
            raise self._error
        return self._wanted

    def take(self) -> None:
        """A thread begins with a chunk (a rate limit's waiting included)."""
        with self._lock:
            if not self._is_taken:
                self._is_taken, self.began = True, self._clock()

    def settle(self, error: LlmcadError | None = None) -> None:
        """One chunk is over (called by the reading thread). The first error is the one reported."""
        with self._lock:
            self._error = self._error or error
            self._left -= 1
            if self._left == 0:
                self.ended = self._clock()
                self._settled.set()


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Aligned stretch of a file, at least up to `end`, and the memory it goes to."""

    read: PendingRead
    begin: int
    end: int
    window: Bytes


class ParallelReader:
    """`threads` reads in flight, in the order submitted. close() joins the threads."""

    def __init__(
        self,
        threads: int = 2,
        chunk_bytes: int = CHUNK_BYTES,
        rate_limit: TokenBucket | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if rate_limit is not None:  # a chunk passes at once: keep it within the burst
            chunk_bytes = min(chunk_bytes, rate_limit.burst_bytes)
        self.chunk_bytes = max(align_down(chunk_bytes), BLOCK)
        self.rate_limit = rate_limit
        self._clock = clock
        self._meter = _Meter(clock)
        self._files: dict[Path, DirectFile] = {}
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue[_Chunk | None] = queue.SimpleQueue()
        self.closed = False
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    @property
    def bytes_read(self) -> int:
        """Bytes that came from disk so far (blocks are read whole, so slightly more than asked for)."""
        return self._meter.total_bytes

    @property
    def busy_s(self) -> float:
        """Seconds during which at least one read was in flight."""
        return self._meter.busy_s()

    @property
    def direct(self) -> bool:
        """Every file so far was read past the page cache."""
        with self._lock:
            return all(file.direct for file in self._files.values())

    def submit(self, file: Path, offset: int, nbytes: int, buffer: AlignedBuffer, at: int = 0) -> PendingRead:
        """Queue a read of [offset, offset + nbytes) into `buffer` from `at` (a multiple of 4096) on.

        Takes span_bytes(offset, nbytes) <= buffer_bytes(nbytes) bytes of the buffer, which belong to the read
        until it is done. Raises ValueError when they do not fit.
        """
        if self.closed or at % BLOCK:
            raise ValueError("the reader is closed" if self.closed else f"at={at} is not a multiple of {BLOCK}")
        begin, end = align_down(offset), align_up(offset + nbytes) if nbytes else align_down(offset)
        window = buffer.view(at, end - begin)
        wanted = buffer.view(at + offset - begin, nbytes)
        starts = range(begin, end, self.chunk_bytes)
        pending = PendingRead(file, wanted, len(starts), self._clock)
        for start in starts:
            stop = min(start + self.chunk_bytes, end)
            part = window[start - begin : stop - begin]
            self._queue.put(_Chunk(pending, start, min(stop, offset + nbytes), part))
        return pending

    def read(self, file: Path, offset: int, nbytes: int, buffer: AlignedBuffer, timeout_s: float = 60.0) -> Bytes:
        """submit() and wait()."""
        return self.submit(file, offset, nbytes, buffer).wait(timeout_s)

    def close(self) -> None:
        """Finish the reads in flight, fail what is still queued, join the threads, close the files."""
        self.closed = True
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()
        for file in self._files.values():
            file.close()
        self._threads, self._files = [], {}

    def __enter__(self) -> "ParallelReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _work(self) -> None:
        while (chunk := self._queue.get()) is not None:
            chunk.read.settle(self._try_read(chunk))
            del chunk  # an idle thread must not keep the buffer alive

    def _try_read(self, chunk: _Chunk) -> LlmcadError | None:
        if chunk.read.failed:
            return None
        if self.closed:
            return RuntimeFailure(f"the reader of {chunk.read.file} was closed before it got to this read")
        chunk.read.take()
        if self.rate_limit is not None:
            self.rate_limit.take(len(chunk.window))
        self._meter.start()
        count = 0
        try:
            count = self._file(chunk.read.file).read_span(chunk.window, chunk.begin, chunk.end)
        except StorageError as error:
            return error
        except OSError as error:
            return StorageError(f"{chunk.read.file} cannot be read: {error}; check the file and its disk.")
        finally:
            self._meter.stop(count)
        return None

    def _file(self, path: Path) -> DirectFile:
        with self._lock:
            if path not in self._files:
                self._files[path] = DirectFile(path)
            return self._files[path]


class _Meter:
    """Bytes read, and the time during which any thread was reading."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.total_bytes = 0
        self._clock = clock
        self._lock = threading.Lock()
        self._in_flight = 0
        self._busy_s = 0.0
        self._since = 0.0

    def start(self) -> None:
        with self._lock:
            if self._in_flight == 0:
                self._since = self._clock()
            self._in_flight += 1

    def stop(self, nbytes: int) -> None:
        with self._lock:
            self.total_bytes += nbytes
            self._in_flight -= 1
            if self._in_flight == 0:
                self._busy_s += self._clock() - self._since

    def busy_s(self) -> float:
        with self._lock:
            return self._busy_s + (self._clock() - self._since if self._in_flight else 0.0)
