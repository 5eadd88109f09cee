"""The loader without read-ahead, for comparison: a shard is read when it is waited for, and not before."""

import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmcad_actors.actors.loader import Loader
from llmcad_actors.core.trace import Recorder
from llmcad_actors.errors import DeadlineError, OverBudgetError
from llmcad_actors.plan.footprint import budget_shard
from llmcad_actors.storage.checkpoint import Checkpoint
from llmcad_actors.storage.extents import extents_of
from llmcad_actors.storage.layout import Layout, layout_of
from llmcad_actors.storage.reader import AlignedBuffer, ParallelReader
from tests.tiny import tiny_llama

TIMEOUT_S = 60.0
EXTENT_BYTES = 8192


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    return layout_of(Checkpoint.open(tiny_llama(Path(tmp_path_factory.mktemp("model")))))


def loader_for(layout: Layout, recorder: Recorder, *, read_ahead: bool, window_bytes: int | None = None) -> Loader:
    loader = Loader(
        window=AlignedBuffer(window_bytes or 2 * layout.streamed_bytes),
        extent_bytes=EXTENT_BYTES,
        reader=ParallelReader(2),
        read_ahead=read_ahead,
        recorder=recorder,
    )
    loader.start((), layout.shards)
    return loader


@pytest.fixture
def loader(layout: Layout) -> Iterator[Loader]:
    loader = loader_for(layout, Recorder("loader", float), read_ahead=False)
    yield loader
    loader.close()


def test_nothing_is_read_before_it_is_waited_for(loader: Loader, layout: Layout) -> None:
    time.sleep(0.2)
    assert loader.progress().bytes_read == 0
    lease = loader.lend(layout.shards[0].name, TIMEOUT_S)
    read = loader.progress().bytes_read
    assert read > 0
    loader.release(lease.number)
    time.sleep(0.2)
    assert loader.progress().bytes_read == read


def test_nothing_is_read_while_a_shard_is_in_use(loader: Loader, layout: Layout) -> None:
    lease = loader.lend(layout.shards[0].name, TIMEOUT_S)
    read = loader.progress().bytes_read
    with pytest.raises(DeadlineError):  # asked for ahead, as the verifier does
        loader.lend(layout.shards[1].name, 0.2)
    assert loader.progress().bytes_read == read
    loader.release(lease.number)
    assert loader.lend(layout.shards[1].name, TIMEOUT_S).shard == layout.shards[1].name


def test_shards_are_read_in_whatever_order_they_are_asked_for(loader: Loader, layout: Layout) -> None:
    loader._recorder.drain(goes_on=True)
    order = [spec.name for spec in (*layout.shards, *layout.shards[::-1], layout.shards[0])]
    for name in order:
        lease = loader.lend(name, TIMEOUT_S)
        assert lease.places
        loader.release(lease.number)
    assert loader.held_bytes == 0
    read = [data["shard"] for event, _, _, data in loader._recorder.drain(goes_on=False).spans if event == "read"]
    twice = layout.shards[-1].name  # the last of the first round begins the second
    assert [name for name, _ in itertools.groupby(read)] == [n for n, _ in itertools.groupby(order)]
    assert read.count(twice) == 2 * len(extents_of(layout.shards[-1], EXTENT_BYTES))


def test_every_read_is_recorded(layout: Layout) -> None:
    ticks = iter(range(10**6))
    recorder = Recorder("loader", lambda: float(next(ticks)))
    recorder.drain(goes_on=True)
    loader = loader_for(layout, recorder, read_ahead=False)
    name = layout.shards[0].name
    loader.release(loader.lend(name, TIMEOUT_S).number)
    loader.close()
    spans = recorder.drain(goes_on=False).spans
    found = [data for event, _, _, data in spans if event == "read"]
    assert len(found) == len(extents_of(layout.shards[0], 8192)) > 1
    assert {data["shard"] for data in found} == {name}
    assert sum(data["bytes"] for data in found) >= layout.shards[0].nbytes


def test_without_it_a_window_of_the_largest_shard_is_enough_and_with_it_is_not(layout: Layout) -> None:
    window_bytes = max(budget_shard(spec, EXTENT_BYTES).room for spec in layout.shards)
    loader = loader_for(layout, Recorder("loader", float), read_ahead=False, window_bytes=window_bytes)
    try:
        for spec in layout.shards * 3:
            lease = loader.lend(spec.name, TIMEOUT_S)
            assert {tensor for tensor, _, _ in lease.places} == {info.name for info in spec.tensors}
            loader.release(lease.number)
    finally:
        loader.close()
    with pytest.raises(OverBudgetError, match="does not fit the window"):
        loader_for(layout, Recorder("loader", float), read_ahead=True, window_bytes=window_bytes)
