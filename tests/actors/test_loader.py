"""The loader as a plain class: what is read comes whole and in order, and never more of it than the window holds."""

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcad_actors.actors.loader import Loader
from llmcad_actors.errors import DeadlineError, OverBudgetError, RuntimeFailure, StorageError
from llmcad_actors.storage.checkpoint import Checkpoint
from llmcad_actors.storage.layout import Layout, ShardSpec, layout_of
from llmcad_actors.storage.reader import ParallelReader, read_bytes
from tests.storage.checkpoints import LLAMA, llama_shapes, write_checkpoint

SOON_S = 60.0  # long enough on any machine; nothing waits for it to pass
NEVER_S = 0.05  # for what cannot come
CONFIG = LLAMA | {"num_hidden_layers": 5}


@dataclass(eq=False)
class Stored:
    """What a store's reference keeps alive."""

    arrays: dict[str, np.ndarray]
    nbytes: int


class Store:
    """Copies what is put, like the object store; knows how many bytes were ever referred to at once."""

    def __init__(self) -> None:
        self._stored: list[weakref.ref[Stored]] = []
        self.peak = 0
        self.num_puts = 0

    def put(self, arrays: dict[str, np.ndarray]) -> Stored:
        copies = {name: array.copy() for name, array in arrays.items()}
        stored = Stored(copies, sum(array.nbytes for array in copies.values()))
        self._stored.append(weakref.ref(stored))
        self.num_puts += 1
        self.peak = max(self.peak, self.held())
        return stored

    def held(self) -> int:
        return sum(stored.nbytes for ref in self._stored if (stored := ref()) is not None)


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """Five layers of equal size, in three files."""
    path = write_checkpoint(tmp_path_factory.mktemp("model"), CONFIG, llama_shapes(CONFIG), num_files=3)
    return layout_of(Checkpoint.open(path))


@contextmanager
def loading(prelude: tuple[ShardSpec, ...], cycle: tuple[ShardSpec, ...], *, window: int, put: Any) -> Iterator[Loader]:
    reader = ParallelReader(threads=2, chunk_bytes=4096)
    loader = Loader(window_bytes=window, piece_bytes=2000, reader=reader, put=put)
    try:
        loader.start(prelude, cycle)
        yield loader
    finally:
        loader.close()


def take(loader: Loader) -> tuple[int, str, dict[str, np.ndarray]]:
    """The next shard: lease, name, and its tensors, copied."""
    lease, name, refs = loader.next(SOON_S)
    return lease, name, {key: array for ref in refs for key, array in ref.arrays.items()}


def test_the_prelude_comes_first_and_then_the_cycle_round_and_round(layout: Layout) -> None:
    prelude, cycle, store = layout.layers[1:3], layout.layers[:1] + layout.layers[3:], Store()
    with loading(prelude, cycle, window=2 * layout.layers[0].nbytes, put=store.put) as loader:
        found = []
        for spec in (*prelude, *cycle, *cycle, *cycle):
            lease, name, arrays = take(loader)
            found.append(name)
            assert arrays.keys() == {info.name for info in spec.tensors}
            assert all(np.array_equal(arrays[info.name], read_bytes(info)) for info in spec.tensors)
            loader.release(lease)
    assert found == [spec.name for spec in (*prelude, *cycle, *cycle, *cycle)]


@settings(max_examples=12)
@given(data=st.data())
def test_what_is_held_never_exceeds_the_window(layout: Layout, data: st.DataObject) -> None:
    shard = layout.layers[0].nbytes
    window = data.draw(st.integers(shard, 4 * shard), "window")
    store, leases = Store(), list[int]()
    with loading((), layout.layers, window=window, put=store.put) as loader:
        for _ in range(12):
            if leases and ((len(leases) + 1) * shard > window or data.draw(st.booleans())):
                loader.release(leases.pop(data.draw(st.integers(0, len(leases) - 1))))
            else:
                leases.append(loader.next(SOON_S)[0])
            assert loader.held_bytes <= window
        assert store.peak <= window
    assert store.num_puts > 0


def test_a_released_shard_makes_room_for_the_next(layout: Layout) -> None:
    with loading((), layout.layers, window=layout.layers[0].nbytes, put=Store().put) as loader:
        lease, _, _ = loader.next(SOON_S)
        with pytest.raises(DeadlineError, match="the next shard did not come within"):
            loader.next(NEVER_S)
        loader.release(lease)
        assert loader.next(SOON_S)[1] == "layer.1"


def test_released_bytes_are_freed(layout: Layout) -> None:
    store = Store()
    with loading(layout.layers[:2], (), window=2 * layout.layers[0].nbytes, put=store.put) as loader:
        for _ in range(2):
            loader.release(loader.next(SOON_S)[0])
        assert store.held() == loader.held_bytes == 0
        with pytest.raises(DeadlineError):
            loader.next(NEVER_S)  # an empty cycle ends the reading


def test_it_reads_ahead_until_the_window_is_full(layout: Layout) -> None:
    shard, full = layout.layers[0].nbytes, threading.Event()
    store = Store()

    def put(arrays: dict[str, np.ndarray]) -> Stored:
        stored = store.put(arrays)
        if store.held() == 3 * shard:
            full.set()
        return stored

    with loading((), layout.layers, window=3 * shard + shard // 2, put=put):
        assert full.wait(SOON_S)  # nobody asked for anything


def test_a_shard_larger_than_the_window_is_refused(layout: Layout) -> None:
    with (
        pytest.raises(OverBudgetError, match="does not fit the window of 100"),
        loading((), layout.layers, window=100, put=Store().put),
    ):
        pass


def test_progress_names_the_shard_and_counts_the_bytes(layout: Layout) -> None:
    with loading((), layout.layers, window=2 * layout.layers[0].nbytes, put=Store().put) as loader:
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
        loading((), layout.layers, window=2 * layout.layers[0].nbytes, put=Store().put) as loader,
        pytest.raises(StorageError, match=r"model\.safetensors"),
    ):
        loader.next(SOON_S)


def test_a_file_that_shrinks_is_reported_and_not_waited_for(tmp_path: Path) -> None:
    layout = layout_of(Checkpoint.open(write_checkpoint(tmp_path, CONFIG, llama_shapes(CONFIG))))
    file = tmp_path / "model.safetensors"
    with loading((), layout.layers, window=layout.layers[0].nbytes, put=Store().put) as loader:
        lease, _, _ = loader.next(SOON_S)
        file.write_bytes(file.read_bytes()[:100])
        loader.release(lease)
        with pytest.raises(StorageError, match=r"model\.safetensors"):
            loader.next(SOON_S)


def test_a_store_that_takes_nothing_is_reported_and_not_waited_for(layout: Layout) -> None:
    def full(arrays: dict[str, np.ndarray]) -> Stored:
        raise OSError("no space left")

    with (
        loading((), layout.layers, window=2 * layout.layers[0].nbytes, put=full) as loader,
        pytest.raises(RuntimeFailure, match="no space left"),
    ):
        loader.next(SOON_S)


def test_closing_ends_threads_and_waits(layout: Layout) -> None:
    before, found = set(threading.enumerate()), list[BaseException]()

    def wait(loader: Loader) -> None:
        try:
            loader.next(SOON_S)
        except StorageError as error:
            found.append(error)

    with loading((), layout.layers, window=layout.layers[0].nbytes, put=Store().put) as loader:
        loader.next(SOON_S)  # and never released
        waiter = threading.Thread(target=wait, args=(loader,))
        waiter.start()
    waiter.join(SOON_S)
    assert [str(error) for error in found] == ["the loader is closed"]
    assert set(threading.enumerate()) <= before
