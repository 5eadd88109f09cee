"""The loader as a plain class: what is read comes whole and in order, and never more of it than the window holds."""

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcad_actors.actors.loader import Loader
from llmcad_actors.errors import ActorFailure, DeadlineError, OverBudgetError, StorageError
from llmcad_actors.messages import Lease
from llmcad_actors.storage.checkpoint import Checkpoint
from llmcad_actors.storage.extents import extents_of
from llmcad_actors.storage.layout import Layout, ShardSpec, layout_of
from llmcad_actors.storage.reader import AlignedBuffer, ParallelReader, read_bytes, span_bytes
from tests.storage.checkpoints import LLAMA, llama_shapes, write_checkpoint

SOON_S = 60.0  # long enough on any machine; nothing waits for it to pass
NEVER_S = 0.05  # for what cannot come
EXTENT_BYTES = 2000
CONFIG = LLAMA | {"num_hidden_layers": 5}


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """Five layers of equal size, in three files."""
    path = write_checkpoint(tmp_path_factory.mktemp("model"), CONFIG, llama_shapes(CONFIG), num_files=3)
    return layout_of(Checkpoint.open(path))


def room_of(spec: ShardSpec) -> int:
    """Bytes of the window that a shard takes."""
    return sum(span_bytes(extent.offset, extent.nbytes) for extent in extents_of(spec, EXTENT_BYTES))


@contextmanager
def loading(
    prelude: tuple[ShardSpec, ...], circle: tuple[ShardSpec, ...], *, shards: float, encoder: tuple[ShardSpec, ...] = ()
) -> Iterator[tuple[Loader, AlignedBuffer]]:
    """A loader whose window has room for so many of the largest shards, wherever their extents begin."""
    specs = (*prelude, *encoder, *circle)
    window = AlignedBuffer(int(shards * max(room_of(spec) for spec in specs)) + largest_extent(*specs))
    loader = Loader(window=window, extent_bytes=EXTENT_BYTES, reader=ParallelReader(threads=2, chunk_bytes=4096))
    try:
        loader.start(prelude, circle, encoder=encoder)
        yield loader, window
    finally:
        loader.close()


def largest_extent(*specs: ShardSpec) -> int:
    return max(span_bytes(p.offset, p.nbytes) for spec in specs for p in extents_of(spec, EXTENT_BYTES))


def is_whole(spec: ShardSpec, lease: Lease, window: AlignedBuffer) -> bool:
    """All the shard's tensors, and nothing else, lie where the lease says."""
    found = {name: window.view(start, nbytes) for name, start, nbytes in lease.places}
    expected = {info.name: read_bytes(info) for info in spec.tensors}
    return found.keys() == expected.keys() and all(np.array_equal(found[n], expected[n]) for n in expected)


def use(loader: Loader, *specs: ShardSpec) -> None:
    """Lease one after the other."""
    for spec in specs:
        loader.release(loader.lend(spec.name, SOON_S).number)


def extents_read(loader: Loader, *specs: ShardSpec) -> list[str]:
    """The shards whose extents are read while these are leased one after the other, and what is read ahead."""
    loader._recorder.drain(goes_on=True)
    use(loader, *specs)
    found = [data["shard"] for event, _, _, data in loader._recorder.drain(goes_on=True).spans if event == "read"]
    return [name for name, _ in itertools.groupby(found)]


def names_of(*specs: ShardSpec) -> list[str]:
    return [spec.name for spec in specs]


def test_the_prelude_comes_first_and_then_the_circle_round_and_round(layout: Layout) -> None:
    prelude, circle = layout.layers[1:3], layout.layers[:1] + layout.layers[3:]
    with loading(prelude, circle, shards=2) as (loader, window):
        for spec in (*prelude, *circle, *circle, *circle):
            lease = loader.lend(spec.name, SOON_S)
            assert lease.shard == spec.name
            assert is_whole(spec, lease, window)
            loader.release(lease.number)


def test_what_is_asked_for_in_order_is_read_once(layout: Layout) -> None:
    encoder, circle = layout.layers[:2], layout.layers[2:]
    with loading((), circle, shards=2, encoder=encoder) as (loader, _):
        order = (*encoder, *circle, *circle, *circle)
        assert extents_read(loader, *order) == names_of(*order)


def test_it_turns_to_whatever_is_asked_for_and_reads_on_from_there(layout: Layout) -> None:
    """To an encoder for a new prompt, to the first layer after a pass that broke off. Few shards are read in vain."""
    encoder, circle = layout.layers[:2], layout.layers[2:]
    with loading((), circle, shards=1, encoder=encoder) as (loader, _):
        use(loader, *encoder, *circle, circle[0])
        again = (*encoder, *circle)
        read = extents_read(loader, *again)
        stale = read.index("layer.0")
        assert stale <= 2  # the one that the window held, and the one being put into it
        assert read[stale:] == names_of(*again)
        use(loader, circle[0])
        again = (circle[0], circle[1])
        read = extents_read(loader, *again)
        assert read[-2:] == names_of(*again)
        assert len(read) <= 4


@pytest.mark.parametrize("name", ["layer.1", "layer.9"], ids=["pinned", "unknown"])
def test_a_shard_that_is_not_in_the_schedule_is_refused_at_once_and_the_others_come(layout: Layout, name: str) -> None:
    with loading(layout.layers[1:2], layout.layers[2:], shards=2) as (loader, _):
        use(loader, layout.layers[1])
        with pytest.raises(ActorFailure, match=f"the loader has no shard {name} in its schedule"):
            loader.lend(name, SOON_S)
        use(loader, *layout.layers[2:])


def test_a_loader_of_an_encoder_alone_waits_until_it_is_asked_for(layout: Layout) -> None:
    with loading((), (), shards=3, encoder=layout.layers[:2]) as (loader, _):
        for _ in range(3):
            use(loader, *layout.layers[:2])
            time.sleep(NEVER_S)
            assert loader.held_bytes == 0


@settings(max_examples=12)
@given(data=st.data())
def test_what_is_leased_stays_whole_until_it_is_released(layout: Layout, data: st.DataObject) -> None:
    """Whatever is read meanwhile, and in whatever order leases end."""
    shards = data.draw(st.floats(1, 4), "window, in shards")
    leases: dict[int, tuple[ShardSpec, Lease]] = {}
    coming = itertools.cycle(layout.layers)
    given = 0
    with loading((), layout.layers, shards=shards) as (loader, window):
        for _ in range(12):
            is_full = bool(leases) and given + 1 - min(leases) > shards  # room comes back in order
            if leases and (is_full or data.draw(st.booleans())):
                ended = data.draw(st.sampled_from(sorted(leases)))
                loader.release(ended)
                del leases[ended]
            else:
                spec = next(coming)
                lease = loader.lend(spec.name, SOON_S)
                leases[lease.number], given = (spec, lease), lease.number + 1
            assert all(is_whole(spec, lease, window) for spec, lease in leases.values())
            assert loader.held_bytes <= window.size


@settings(max_examples=25)
@given(data=st.data())
def test_what_is_streamed_may_change_at_any_time_and_any_of_it_may_be_asked_for(
    layout: Layout, data: st.DataObject
) -> None:
    streamed = [0, 1, 2, 3, 4]
    with loading((), layout.layers, shards=data.draw(st.floats(1, 4), "window")) as (loader, window):
        for _ in range(6):
            for index in data.draw(st.lists(st.sampled_from(streamed), max_size=6), "asked for"):
                lease = loader.lend(layout.layers[index].name, SOON_S)
                assert lease.shard == layout.layers[index].name
                assert is_whole(layout.layers[index], lease, window)
                loader.release(lease.number)
            streamed = sorted(data.draw(st.sets(st.integers(0, 4), min_size=1), "streamed"))
            loader.stream([layout.layers[index].name for index in streamed])


def test_shards_of_the_prelude_are_streamed_when_that_is_wanted(layout: Layout) -> None:
    loader = Loader(window=AlignedBuffer(1 << 20), extent_bytes=EXTENT_BYTES, reader=ParallelReader())
    loader.start(layout.layers, layout.layers, streamed=())
    use(loader, *layout.layers)
    loader.stream(names_of(*layout.layers[3:]))
    use(loader, *layout.layers[3:], *layout.layers[3:])
    with pytest.raises(ActorFailure, match="in its schedule"):
        loader.lend("layer.2", SOON_S)
    loader.close()


def test_a_released_shard_makes_room_for_the_next(layout: Layout) -> None:
    with loading((), layout.layers, shards=1) as (loader, _):
        lease = loader.lend("layer.0", SOON_S)
        with pytest.raises(DeadlineError, match=r"shard layer\.1 did not come within"):
            loader.lend("layer.1", NEVER_S)
        loader.release(lease.number)
        assert loader.lend("layer.1", SOON_S).shard == "layer.1"


def test_released_bytes_are_freed(layout: Layout) -> None:
    with loading(layout.layers[:2], (), shards=2) as (loader, _):
        use(loader, *layout.layers[:2])
        assert loader.held_bytes == 0
        time.sleep(NEVER_S)
        assert loader.held_bytes == 0  # an empty circle ends the reading


def test_it_reads_ahead_until_the_window_is_full(layout: Layout) -> None:
    """Nobody asks for anything."""
    with loading((), layout.layers, shards=3.5) as (loader, _):
        give_up = time.monotonic() + SOON_S
        while loader.progress().bytes_read < 3 * layout.layers[0].nbytes:
            assert time.monotonic() < give_up
            time.sleep(0.01)
        assert loader.progress().shard == ""


def test_a_shard_larger_than_the_window_is_refused(layout: Layout) -> None:
    loader = Loader(window=AlignedBuffer(4096), extent_bytes=EXTENT_BYTES, reader=ParallelReader())
    with pytest.raises(OverBudgetError, match="does not fit the window of 4096"):
        loader.start((), layout.layers)
    loader.close()


def test_progress_names_the_shard_and_counts_the_bytes(layout: Layout) -> None:
    with loading((), layout.layers, shards=2) as (loader, _):
        assert loader.progress().shard == ""
        use(loader, *layout.layers[:3])
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
        loader.lend("layer.0", SOON_S)


def test_a_file_that_shrinks_is_reported_and_not_waited_for(tmp_path: Path) -> None:
    layout = layout_of(Checkpoint.open(write_checkpoint(tmp_path, CONFIG, llama_shapes(CONFIG))))
    file = tmp_path / "model.safetensors"
    with loading((), layout.layers, shards=1) as (loader, _):
        lease = loader.lend("layer.0", SOON_S)
        file.write_bytes(file.read_bytes()[:100])
        loader.release(lease.number)
        with pytest.raises(StorageError, match=r"model\.safetensors"):
            use(loader, *layout.layers[1:])


def test_closing_ends_threads_and_waits(layout: Layout) -> None:
    before, found = set(threading.enumerate()), list[BaseException]()

    def wait(loader: Loader) -> None:
        try:
            loader.lend("layer.1", SOON_S)
        except StorageError as error:
            found.append(error)

    with loading((), layout.layers, shards=1) as (loader, _):
        loader.lend("layer.0", SOON_S)  # and never released
        waiter = threading.Thread(target=wait, args=(loader,))
        waiter.start()
    waiter.join(SOON_S)
    assert [str(error) for error in found] == ["the loader is closed"]
    assert set(threading.enumerate()) <= before
