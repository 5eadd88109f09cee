"""The loader as a plain class: what is read comes whole and in order, and never more of it than the window holds."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcad_actors.actors.channel import Place
from llmcad_actors.actors.loader import Loader
from llmcad_actors.errors import DeadlineError, OverBudgetError, StorageError
from llmcad_actors.storage.checkpoint import Checkpoint
from llmcad_actors.storage.layout import Layout, ShardSpec, layout_of
from llmcad_actors.storage.pieces import pieces_of
from llmcad_actors.storage.reader import AlignedBuffer, ParallelReader, read_bytes, span_bytes
from tests.storage.checkpoints import LLAMA, llama_shapes, write_checkpoint

SOON_S = 60.0  # long enough on any machine; nothing waits for it to pass
NEVER_S = 0.05  # for what cannot come
PIECE_BYTES = 2000
CONFIG = LLAMA | {"num_hidden_layers": 5}


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """Five layers of equal size, in three files."""
    path = write_checkpoint(tmp_path_factory.mktemp("model"), CONFIG, llama_shapes(CONFIG), num_files=3)
    return layout_of(Checkpoint.open(path))


def room_of(spec: ShardSpec) -> int:
    """Bytes of the window that a shard takes."""
    return sum(span_bytes(piece.offset, piece.nbytes) for piece in pieces_of(spec, PIECE_BYTES))


@contextmanager
def loading(
    prelude: tuple[ShardSpec, ...], cycle: tuple[ShardSpec, ...], *, shards: float, opening: tuple[ShardSpec, ...] = ()
) -> Iterator[tuple[Loader, AlignedBuffer]]:
    """A loader whose window has room for so many of the largest shards, wherever their pieces begin."""
    specs = (*prelude, *opening, *cycle)
    window = AlignedBuffer(int(shards * max(room_of(spec) for spec in specs)) + largest_piece(*specs))
    loader = Loader(window=window, piece_bytes=PIECE_BYTES, reader=ParallelReader(threads=2, chunk_bytes=4096))
    try:
        loader.start(prelude, cycle, opening)
        yield loader, window
    finally:
        loader.close()


def largest_piece(*specs: ShardSpec) -> int:
    return max(span_bytes(p.offset, p.nbytes) for spec in specs for p in pieces_of(spec, PIECE_BYTES))


def is_whole(spec: ShardSpec, places: tuple[Place, ...], window: AlignedBuffer) -> bool:
    """All the shard's tensors, and nothing else, lie where the lease says."""
    found = {name: window.view(start, nbytes) for name, start, nbytes in places}
    expected = {info.name: read_bytes(info) for info in spec.tensors}
    return found.keys() == expected.keys() and all(np.array_equal(found[n], expected[n]) for n in expected)


def test_the_prelude_comes_first_and_then_the_cycle_round_and_round(layout: Layout) -> None:
    prelude, cycle = layout.layers[1:3], layout.layers[:1] + layout.layers[3:]
    with loading(prelude, cycle, shards=2) as (loader, window):
        found = []
        for spec in (*prelude, *cycle, *cycle, *cycle):
            lease, name, places = loader.next(SOON_S)
            found.append(name)
            assert is_whole(spec, places, window)
            loader.release(lease)
    assert found == [spec.name for spec in (*prelude, *cycle, *cycle, *cycle)]


def test_an_opening_comes_first_and_again_only_when_it_is_asked_for(layout: Layout) -> None:
    """What was read ahead is lent before it, and the cycle begins anew after it."""
    opening, cycle = layout.layers[:2], layout.layers[2:]
    with loading((), cycle, shards=1, opening=opening) as (loader, _):

        def take(count: int) -> list[str]:
            found = []
            for _ in range(count):
                lease, name, _ = loader.next(SOON_S)
                found.append(name)
                loader.release(lease)
            return found

        loader.open()  # it is coming anyway
        first, names = [spec.name for spec in (*opening, *cycle)], [spec.name for spec in cycle]
        assert take(5 + 3 + 1) == [*first, *names, names[0]]
        loader.open()
        found = take(7)
        stale = found.index("layer.0")
        assert stale <= 2  # the one that the window held, and the one being put into it
        assert found[stale:] == (first + names)[: 7 - stale]


def test_a_loader_of_an_opening_alone_waits_until_it_is_asked_for(layout: Layout) -> None:
    with loading((), (), shards=2, opening=layout.layers[:2]) as (loader, _):
        for _ in range(3):
            found = []
            for _ in range(2):
                lease, name, _ = loader.next(SOON_S)
                found.append(name)
                loader.release(lease)
            assert found == ["layer.0", "layer.1"]
            with pytest.raises(DeadlineError):
                loader.next(NEVER_S)
            loader.open()


@settings(max_examples=12)
@given(data=st.data())
def test_what_is_leased_stays_whole_until_it_is_released(layout: Layout, data: st.DataObject) -> None:
    """Whatever is read meanwhile, and in whatever order leases end."""
    shards = data.draw(st.floats(1, 4), "window, in shards")
    leases: dict[int, tuple[ShardSpec, tuple[Place, ...]]] = {}
    given = 0
    specs = {spec.name: spec for spec in layout.layers}
    with loading((), layout.layers, shards=shards) as (loader, window):
        for _ in range(12):
            is_full = bool(leases) and given + 1 - min(leases) > shards  # room comes back in order
            if leases and (is_full or data.draw(st.booleans())):
                ended = data.draw(st.sampled_from(sorted(leases)))
                loader.release(ended)
                del leases[ended]
            else:
                lease, name, places = loader.next(SOON_S)
                leases[lease], given = (specs[name], places), lease + 1
            assert all(is_whole(spec, places, window) for spec, places in leases.values())
            assert loader.held_bytes <= window.size


@settings(max_examples=12)
@given(data=st.data())
def test_the_cycle_may_change_at_any_time_and_every_shard_of_the_new_one_comes(
    layout: Layout, data: st.DataObject
) -> None:
    """Shards that were read ahead and are not wanted are given back, as the verifier does."""
    streamed = [0, 1, 2, 3, 4]
    with loading((), layout.layers, shards=data.draw(st.floats(1, 4), "window")) as (loader, window):
        for _ in range(6):
            for index in streamed:
                for _ in range(20):
                    lease, name, places = loader.next(SOON_S)
                    if name == layout.layers[index].name:
                        break
                    loader.release(lease)
                else:
                    pytest.fail(f"{layout.layers[index].name} does not come")
                assert is_whole(layout.layers[index], places, window)
                loader.release(lease)
            streamed = sorted(data.draw(st.sets(st.integers(0, 4), min_size=1), "cycle"))
            loader.stream([layout.layers[index] for index in streamed])


def test_shards_of_the_prelude_are_streamed_when_the_cycle_asks_for_them(layout: Layout) -> None:
    loader = Loader(window=AlignedBuffer(1 << 20), piece_bytes=PIECE_BYTES, reader=ParallelReader())
    loader.start(layout.layers, (), order=layout.layers)
    for _ in layout.layers:
        loader.release(loader.next(SOON_S)[0])
    loader.stream(layout.layers[3:])
    names = []
    for _ in range(4):
        lease, name, _ = loader.next(SOON_S)
        names.append(name)
        loader.release(lease)
    loader.close()
    assert names == ["layer.3", "layer.4"] * 2


def test_a_released_shard_makes_room_for_the_next(layout: Layout) -> None:
    with loading((), layout.layers, shards=1) as (loader, _):
        lease, _, _ = loader.next(SOON_S)
        with pytest.raises(DeadlineError, match="the next shard did not come within"):
            loader.next(NEVER_S)
        loader.release(lease)
        assert loader.next(SOON_S)[1] == "layer.1"


def test_released_bytes_are_freed(layout: Layout) -> None:
    with loading(layout.layers[:2], (), shards=2) as (loader, _):
        for _ in range(2):
            loader.release(loader.next(SOON_S)[0])
        assert loader.held_bytes == 0
        with pytest.raises(DeadlineError):
            loader.next(NEVER_S)  # an empty cycle ends the reading


def test_it_reads_ahead_until_the_window_is_full(layout: Layout) -> None:
    """Nobody asks for anything."""
    with loading((), layout.layers, shards=3.5) as (loader, _):
        give_up = time.monotonic() + SOON_S
        while loader.progress().bytes_read < 3 * layout.layers[0].nbytes:
            assert time.monotonic() < give_up
            time.sleep(0.01)
        assert loader.progress().shard == ""


def test_a_shard_larger_than_the_window_is_refused(layout: Layout) -> None:
    loader = Loader(window=AlignedBuffer(4096), piece_bytes=PIECE_BYTES, reader=ParallelReader())
    with pytest.raises(OverBudgetError, match="does not fit the window of 4096"):
        loader.start((), layout.layers)
    loader.close()


def test_progress_names_the_shard_and_counts_the_bytes(layout: Layout) -> None:
    with loading((), layout.layers, shards=2) as (loader, _):
        assert loader.progress().shard == ""
        for _ in range(3):
            loader.release(loader.next(SOON_S)[0])
        progress = loader.progress()
        assert (progress.shard, progress.index, progress.num_shards) == ("layer.2", 2, 5)
        assert progress.bytes_read >= 3 * layout.layers[0].nbytes


def test_a_file_that_vanishes_is_reported_and_not_waited_for(tmp_path: Path) -> None:
    layout = layout_of(Checkpoint.open(write_checkpoint(tmp_path, CONFIG, llama_shapes(CONFIG))))
    (tmp_path / "model.safetensors").unlink()
    with (
        loading((), layout.layers, shards=2) as (loader, _),
        pytest.raises(StorageError, match=r"model\.safetensors"),
    ):
        loader.next(SOON_S)


def test_a_file_that_shrinks_is_reported_and_not_waited_for(tmp_path: Path) -> None:
    layout = layout_of(Checkpoint.open(write_checkpoint(tmp_path, CONFIG, llama_shapes(CONFIG))))
    file = tmp_path / "model.safetensors"
    with loading((), layout.layers, shards=1) as (loader, _):
        lease, _, _ = loader.next(SOON_S)
        file.write_bytes(file.read_bytes()[:100])
        loader.release(lease)
        with pytest.raises(StorageError, match=r"model\.safetensors"):
            loader.next(SOON_S)


def test_closing_ends_threads_and_waits(layout: Layout) -> None:
    before, found = set(threading.enumerate()), list[BaseException]()

    def wait(loader: Loader) -> None:
        try:
            loader.next(SOON_S)
        except StorageError as error:
            found.append(error)

    with loading((), layout.layers, shards=1) as (loader, _):
        loader.next(SOON_S)  # and never released
        waiter = threading.Thread(target=wait, args=(loader,))
        waiter.start()
    waiter.join(SOON_S)
    assert [str(error) for error in found] == ["the loader is closed"]
    assert set(threading.enumerate()) <= before
