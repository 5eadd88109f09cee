"""The loader without read-ahead, for comparison: a shard is read when it is waited for, and not before."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmcad_actors.actors.loader import Loader
from llmcad_actors.core.trace import Recorder
from llmcad_actors.errors import DeadlineError
from llmcad_actors.storage.checkpoint import Checkpoint
from llmcad_actors.storage.layout import Layout, layout_of
from llmcad_actors.storage.reader import ParallelReader
from tests.tiny import tiny_llama

TIMEOUT_S = 60.0


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    return layout_of(Checkpoint.open(tiny_llama(Path(tmp_path_factory.mktemp("model")))))


class Gate:
    """A store that tells when something was put."""

    def __init__(self) -> None:
        self.was_put = threading.Event()

    def put(self, arrays: dict[str, Any]) -> object:
        self.was_put.set()
        return object()


def loader_for(layout: Layout, gate: Gate, recorder: Recorder, *, read_ahead: bool) -> Loader:
    loader = Loader(
        window_bytes=layout.streamed_bytes,
        piece_bytes=8192,
        reader=ParallelReader(2),
        put=gate.put,
        read_ahead=read_ahead,
        recorder=recorder,
    )
    loader.start((), layout.shards)
    return loader


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def loader(layout: Layout, gate: Gate) -> Iterator[Loader]:
    loader = loader_for(layout, gate, Recorder("loader", float), read_ahead=False)
    yield loader
    loader.close()


def test_nothing_is_read_before_it_is_waited_for(loader: Loader, gate: Gate) -> None:
    assert not gate.was_put.wait(0.2)
    lease, *_ = loader.next(TIMEOUT_S)
    gate.was_put.clear()
    loader.release(lease)
    assert not gate.was_put.wait(0.2)


def test_nothing_is_read_while_a_shard_is_in_use(loader: Loader, gate: Gate, layout: Layout) -> None:
    lease, *_ = loader.next(TIMEOUT_S)
    gate.was_put.clear()
    with pytest.raises(DeadlineError):  # asked for ahead, as the verifier does
        loader.next(0.2)
    assert not gate.was_put.is_set()
    loader.release(lease)
    _, name, _ = loader.next(TIMEOUT_S)
    assert name == layout.shards[1].name


def test_shards_come_in_the_same_order_as_ever(loader: Loader, layout: Layout) -> None:
    names = []
    for _ in range(2 * len(layout.shards)):
        lease, name, refs = loader.next(TIMEOUT_S)
        assert refs
        names.append(name)
        loader.release(lease)
    assert names == 2 * [spec.name for spec in layout.shards]
    assert loader.held_bytes == 0


def test_with_read_ahead_the_window_fills_by_itself(layout: Layout, gate: Gate) -> None:
    loader = loader_for(layout, gate, Recorder("loader", float), read_ahead=True)
    assert gate.was_put.wait(TIMEOUT_S)
    loader.close()


def test_every_read_and_put_is_recorded(layout: Layout, gate: Gate) -> None:
    ticks = iter(range(10**6))
    recorder = Recorder("loader", lambda: float(next(ticks)))
    recorder.drain(keep_on=True)
    loader = loader_for(layout, gate, recorder, read_ahead=False)
    lease, name, refs = loader.next(TIMEOUT_S)
    loader.release(lease)
    loader.close()
    spans = recorder.drain(keep_on=False).spans
    for kind in ("read", "put"):
        found = [data for event, _, _, data in spans if event == kind]
        assert len(found) == len(refs) > 1
        assert {data["shard"] for data in found} == {name}
        assert sum(data["bytes"] for data in found) >= layout.shards[0].nbytes
