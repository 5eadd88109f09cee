"""Whatever range is asked for, exactly its bytes come back; past the page cache, by one thread or many."""

import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcad_actors.errors import DeadlineError, RuntimeFailure, StorageError
from llmcad_actors.storage.checkpoint import TensorInfo
from llmcad_actors.storage.direct import BLOCK, drop_cache
from llmcad_actors.storage.reader import (
    AlignedBuffer,
    Bytes,
    DirectFile,
    EmbeddingReader,
    ParallelReader,
    TokenBucket,
    buffer_bytes,
    read_bytes,
    read_rows,
    span_bytes,
)

SIZE = 5 * BLOCK * 16 + 777  # ends inside a block
ROW = 100
TIMEOUT_S = 30.0


@pytest.fixture(scope="module")
def content() -> bytes:
    return np.random.default_rng(0).bytes(SIZE)


@pytest.fixture(scope="module")
def file(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reader") / "data"
    path.write_bytes(content)
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
    return path


@pytest.fixture(scope="module")
def table(file: Path) -> TensorInfo:
    rows = (SIZE - 13) // ROW
    return TensorInfo("embed", "BF16", (rows, ROW // 2), file, 13, rows * ROW)


@pytest.fixture(scope="module")
def reader() -> Iterator[ParallelReader]:
    with ParallelReader(threads=3, chunk_bytes=2 * BLOCK) as found:
        yield found


def refuse_open(path: Path, flags: int) -> int:
    if flags & os.O_DIRECT:
        raise OSError(errno.EINVAL, "no direct I/O here")
    return os.open(path, flags)


def cached_pages(path: Path) -> int:
    """Pages of the file that are in the page cache."""
    pages = -(-path.stat().st_size // BLOCK)
    seen = (ctypes.c_ubyte * pages)()
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, flags=mmap.MAP_PRIVATE) as mapped:
        address = ctypes.c_char.from_buffer(mapped)
        libc = ctypes.CDLL(None, use_errno=True)
        where = ctypes.c_void_p(ctypes.addressof(address))
        assert libc.mincore(where, ctypes.c_size_t(len(mapped)), seen) == 0
        del address, where
    return sum(n & 1 for n in seen)


ranges = st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)).map(lambda pair: (min(pair), max(pair)))


@settings(max_examples=80, deadline=None)
@given(bounds=ranges, direct=st.booleans())
def test_any_range_comes_back_exactly(bounds: tuple[int, int], direct: bool, file: Path, content: bytes) -> None:
    begin, end = bounds
    buffer = AlignedBuffer.for_range(end - begin)
    with DirectFile(file, direct=direct) as opened:
        start = opened.read_into(buffer, begin, end - begin)
    assert buffer.view(start, end - begin).tobytes() == content[begin:end]


@settings(max_examples=80, deadline=None)
@given(bounds=st.lists(ranges, max_size=6))
def test_any_pieces_by_several_threads_come_back_exactly(
    bounds: list[tuple[int, int]], reader: ParallelReader, file: Path, content: bytes
) -> None:
    pending = [reader.submit(file, b, e - b, AlignedBuffer.for_range(e - b)) for b, e in bounds]
    for read, (begin, end) in zip(pending, bounds, strict=True):
        assert read.wait(TIMEOUT_S).tobytes() == content[begin:end]
        assert read.done


def test_several_ranges_share_a_buffer(reader: ParallelReader, file: Path, content: bytes) -> None:
    ranges = [(5, 9000), (70_000, 80_000), (SIZE - 10, SIZE)]
    places = np.cumsum([0, *(span_bytes(b, e - b) for b, e in ranges)]).tolist()
    buffer = AlignedBuffer(places[-1])
    pending = [reader.submit(file, b, e - b, buffer, at) for (b, e), at in zip(ranges, places[:-1], strict=True)]
    found = [read.wait(TIMEOUT_S).tobytes() for read in pending]
    assert found == [content[b:e] for b, e in ranges]


def test_a_buffer_of_buffer_bytes_takes_a_range_wherever_it_begins() -> None:
    for nbytes in (1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK):
        assert max(span_bytes(offset, nbytes) for offset in range(2 * BLOCK)) <= buffer_bytes(nbytes)


def test_direct_reads_leave_nothing_in_the_page_cache(file: Path) -> None:
    with DirectFile(file) as opened:
        if not opened.direct:
            pytest.skip("this file system has no O_DIRECT")
        drop_cache(opened._fd, 0, SIZE)
        opened.read_into(AlignedBuffer.for_range(SIZE), 0, SIZE)
        assert opened.direct
    assert cached_pages(file) == 0


def test_where_direct_is_refused_at_open_reads_are_buffered_and_dropped(file: Path, content: bytes) -> None:
    buffer = AlignedBuffer.for_range(SIZE)
    with DirectFile(file, open_file=refuse_open) as opened:
        assert not opened.direct
        start = opened.read_into(buffer, 0, SIZE)
    assert buffer.view(start, SIZE).tobytes() == content
    assert cached_pages(file) == 0


def test_where_direct_is_refused_at_the_first_read_it_goes_on_buffered(file: Path, content: bytes) -> None:
    with DirectFile(file) as opened:
        if not opened.direct:
            pytest.skip("this file system has no O_DIRECT")
        odd = AlignedBuffer(SIZE + 2 * BLOCK).view(1, 2 * BLOCK)  # memory that O_DIRECT must refuse: EINVAL
        opened.read_span(odd, BLOCK, 3 * BLOCK)
        assert not opened.direct
        assert odd.tobytes() == content[BLOCK : 3 * BLOCK]


class ShortReads(DirectFile):
    """Every read stops inside a block, and insists on being aligned."""

    def _pread(self, window: Bytes, offset: int) -> int:
        assert offset % BLOCK == window.ctypes.data % BLOCK == 0
        return min(super()._pread(window, offset), BLOCK + 1000)


def test_after_a_short_read_it_goes_on_from_the_start_of_a_block(file: Path, content: bytes) -> None:
    buffer = AlignedBuffer.for_range(SIZE)
    with ShortReads(file) as opened:
        start = opened.read_into(buffer, 5, SIZE - 5)
    assert buffer.view(start, SIZE - 5).tobytes() == content[5:]


def test_a_file_that_ends_too_early_says_where(tmp_path: Path, reader: ParallelReader) -> None:
    path = tmp_path / "short"
    path.write_bytes(b"x" * (BLOCK + 100))
    with DirectFile(path) as opened:
        direct_here = opened.direct
    for nbytes in (BLOCK + 101, 5 * BLOCK):
        with (
            DirectFile(path) as opened,
            pytest.raises(StorageError, match=r"short ends at byte 4,196 instead of"),
        ):
            opened.read_into(AlignedBuffer.for_range(nbytes), 0, nbytes)
        assert opened.direct == direct_here  # going on from the middle of a block would be refused as unaligned
    with pytest.raises(StorageError, match="short ends at byte"):
        reader.read(path, 0, 20 * BLOCK, AlignedBuffer.for_range(20 * BLOCK))


def test_a_file_that_vanished_is_a_storage_error_and_the_reader_lives_on(
    tmp_path: Path, reader: ParallelReader, file: Path, content: bytes
) -> None:
    pending = reader.submit(tmp_path / "gone", 0, 9 * BLOCK, AlignedBuffer.for_range(9 * BLOCK))
    with pytest.raises(StorageError, match="gone cannot be read: No such file"):
        pending.wait(TIMEOUT_S)
    assert pending.done and pending.failed
    assert reader.read(file, 3, 7, AlignedBuffer.for_range(7)).tobytes() == content[3:10]


def test_an_unreadable_file_is_a_storage_error(tmp_path: Path, reader: ParallelReader) -> None:
    with pytest.raises(StorageError, match="cannot be read: Is a directory"):
        reader.read(tmp_path, 0, 10, AlignedBuffer.for_range(10))


class Gate:
    """A rate limit that lets nothing pass until opened."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.now = 0.0

    def bucket(self) -> TokenBucket:
        return TokenBucket(1e9, lambda: self.now, self._sleep)

    def _sleep(self, seconds: float) -> None:
        self.opened.wait(TIMEOUT_S)
        self.now += seconds


def test_a_wait_has_a_deadline_and_the_read_still_completes(file: Path, content: bytes) -> None:
    gate = Gate()
    with ParallelReader(threads=1, rate_limit=gate.bucket()) as reader:
        pending = reader.submit(file, 5, 10, AlignedBuffer.for_range(10))
        with pytest.raises(DeadlineError, match=r"10 bytes of .*data took over 0.01 s"):
            pending.wait(0.01)
        assert not pending.done
        gate.opened.set()
        assert pending.wait(TIMEOUT_S).tobytes() == content[5:15]


def test_close_joins_its_threads_and_fails_what_is_still_queued(file: Path) -> None:
    before, gate = threading.active_count(), Gate()
    reader = ParallelReader(threads=2, chunk_bytes=BLOCK, rate_limit=gate.bucket())
    pending = reader.submit(file, 0, SIZE, AlignedBuffer.for_range(SIZE))
    closing = threading.Thread(target=reader.close)
    closing.start()
    while not reader.closed:
        closing.join(0.001)
    gate.opened.set()
    closing.join(TIMEOUT_S)
    assert threading.active_count() == before
    with pytest.raises(RuntimeFailure, match="was closed before it got to this read"):
        pending.wait(0)
    with pytest.raises(ValueError, match="closed"):
        reader.submit(file, 0, 1, AlignedBuffer.for_range(1))
    reader.close()


def test_counters_add_up(file: Path) -> None:
    ticks = iter(range(10_000))
    with ParallelReader(threads=1, chunk_bytes=BLOCK, clock=lambda: float(next(ticks))) as reader:
        reader.read(file, 1, 2 * BLOCK - 2, AlignedBuffer.for_range(2 * BLOCK))
        assert reader.bytes_read == 2 * BLOCK
        assert reader.busy_s == 2.0
        reader.read(file, SIZE - 7, 7, AlignedBuffer.for_range(7))
        assert reader.bytes_read == 2 * BLOCK + 777


def test_a_range_that_does_not_fit_its_buffer_is_refused(reader: ParallelReader, file: Path) -> None:
    with pytest.raises(ValueError, match="lies outside a buffer"):
        reader.submit(file, BLOCK - 1, 2, AlignedBuffer(BLOCK))
    with pytest.raises(ValueError, match="not a multiple"):
        reader.submit(file, 0, 2, AlignedBuffer(4 * BLOCK), at=100)


def test_a_buffer_outlives_close_only_through_its_views() -> None:
    buffer = AlignedBuffer(10, populate=True)
    view = buffer.view(0, 10)
    view[:] = 7
    assert view.ctypes.data % BLOCK == 0
    buffer.close()
    assert view.tolist() == [7] * 10
    empty = AlignedBuffer(10)
    empty.close()
    with pytest.raises(ValueError):
        empty.view(0, 1)


def test_read_bytes_is_the_tensor_and_leaves_no_cache(table: TensorInfo, content: bytes) -> None:
    assert read_bytes(table).tobytes() == content[13 : 13 + table.nbytes]
    assert cached_pages(table.file) == 0


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_rows_come_back_in_the_order_asked(data: st.DataObject, table: TensorInfo, content: bytes) -> None:
    rows = data.draw(st.lists(st.integers(0, table.shape[0] - 1), max_size=30))
    found = read_rows(table, rows)
    assert found.shape == (len(rows), ROW)
    for row, got in zip(rows, found, strict=True):
        assert got.tobytes() == content[13 + row * ROW : 13 + (row + 1) * ROW]


def test_adjacent_rows_are_read_once_and_leave_no_cache(table: TensorInfo) -> None:
    with EmbeddingReader(table) as reader:
        reader.read_rows([5, 3, 4, 5, 100])
        assert reader.bytes_read == 4 * ROW
        assert cached_pages(table.file) == 0


def test_rows_that_do_not_exist_are_refused(table: TensorInfo) -> None:
    for rows in ([-1], [0, table.shape[0]]):
        with pytest.raises(IndexError, match="of embed: it has"):
            read_rows(table, rows)


def test_an_embedding_whose_file_is_gone_or_short_is_a_storage_error(tmp_path: Path) -> None:
    info = TensorInfo("embed", "F32", (4, 1), tmp_path / "short", 0, 16)
    with pytest.raises(StorageError, match="cannot be read: No such file"):
        EmbeddingReader(info)
    info.file.write_bytes(b"12345")
    with pytest.raises(StorageError, match="ends inside embed"):
        read_rows(info, [1])


class FakeTime:
    """A clock that moves only when somebody sleeps or says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@settings(max_examples=50, deadline=None)
@given(
    steps=st.lists(st.tuples(st.integers(1, 5000), st.floats(0, 0.2)), min_size=1, max_size=50),
    rate=st.floats(100, 1e5),
)
def test_no_more_than_rate_and_burst_ever_passes(steps: list[tuple[int, float]], rate: float) -> None:
    time, passed = FakeTime(), 0
    bucket = TokenBucket(rate, time.clock, time.sleep)
    for nbytes, pause in steps:
        bucket.take(nbytes)
        passed += nbytes
        assert passed <= rate * (time.now - 100.0 + TokenBucket.BURST_S) * 1.000001
        time.now += pause


def test_without_pauses_the_rate_is_exact() -> None:
    time = FakeTime()
    bucket = TokenBucket(1e6, time.clock, time.sleep)
    for _ in range(100):
        bucket.take(50_000)
        time.now += 0.01  # the read itself, shorter than the burst: no credit is lost
    assert 5e6 / (time.now - 100.0) == pytest.approx(1e6, rel=0.01)


def test_idle_time_earns_no_more_than_the_burst() -> None:
    time = FakeTime()
    bucket = TokenBucket(1e6, time.clock, time.sleep)
    time.now += 10.0
    for _ in range(100):
        bucket.take(10_000)
    assert time.now - 110.0 == pytest.approx(1.0 - TokenBucket.BURST_S)


def test_the_rate_limit_is_shared_by_threads(file: Path) -> None:
    time, lock = FakeTime(), threading.Lock()

    def sleep(seconds: float) -> None:
        with lock:
            time.now += seconds

    bucket = TokenBucket(BLOCK * 1000, time.clock, sleep)
    with ParallelReader(threads=4, rate_limit=bucket) as reader:
        assert reader.chunk_bytes <= bucket.burst_bytes
        reader.read(file, 0, SIZE, AlignedBuffer.for_range(SIZE))
    with bucket._lock:  # booked in full: the span's bytes at the rate, less the burst at most
        assert bucket._booked_until - 100.0 == pytest.approx(span_bytes(0, SIZE) / (BLOCK * 1000), abs=0.051)


def test_a_rate_must_be_positive() -> None:
    with pytest.raises(ValueError, match="above 0"):
        TokenBucket(0)
