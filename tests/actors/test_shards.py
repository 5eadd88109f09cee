"""The verifier's leases over a real loader, socket and files: whatever a pass does, the right bytes, read once.

Loader and verifier are threads of this process here; what they say to each other is what they say in two.
"""

import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcad_actors.actors.channel import LeaseServer
from llmcad_actors.actors.loader import Loader
from llmcad_actors.actors.shards import LeasedShards
from llmcad_actors.core.trace import Recorder
from llmcad_actors.errors import ActorFailure
from llmcad_actors.storage.checkpoint import Checkpoint
from llmcad_actors.storage.extents import room_bytes
from llmcad_actors.storage.layout import Layout, ShardSpec, layout_of
from llmcad_actors.storage.reader import AlignedBuffer, ParallelReader, read_bytes
from tests.storage.checkpoints import LLAMA, llama_shapes, write_checkpoint

EXTENT_BYTES = 2000
CONFIG = LLAMA | {"num_hidden_layers": 6}
SOON_S = 60.0
ENCODER = 2  # of the layers, the first play an encoder's part


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    return layout_of(Checkpoint.open(write_checkpoint(tmp_path_factory.mktemp("model"), CONFIG, llama_shapes(CONFIG))))


class Pair:
    """A loader and the verifier's side of it."""

    def __init__(
        self, layers: Sequence[ShardSpec], pinned: Sequence[ShardSpec], shards: float, *, read_ahead: bool = True
    ) -> None:
        self.layers = layers
        self.recorder = Recorder("loader", time.monotonic)
        self.recorder.drain(goes_on=True)
        room = max(room_bytes(spec, EXTENT_BYTES, alone=False) for spec in layers)
        window = AlignedBuffer(int(shards * room))
        self.loader = Loader(
            window=window,
            extent_bytes=EXTENT_BYTES,
            reader=ParallelReader(threads=2, chunk_bytes=4096),
            read_ahead=read_ahead,
            recorder=self.recorder,
        )
        names = [spec.name for spec in layers]
        streamed = [spec.name for spec in layers if spec not in pinned]
        self.loader.start(pinned, layers[ENCODER:], encoder=layers[:ENCODER], streamed=streamed)
        address = LeaseServer(self.loader).address
        self.source = LeasedShards(window.view(0, window.size), address, names, names[:ENCODER])
        self.source.pin(pinned)

    def run(self, specs: Sequence[ShardSpec]) -> None:
        """A pass, or a part of one; what is leased must be there, and stay until its lease ends."""
        for spec in specs:
            with self.source.lease(spec.name) as arrays:
                assert arrays.keys() == {info.name for info in spec.tensors}
                for info in spec.tensors:
                    assert np.array_equal(arrays[info.name], read_bytes(info))

    def read(self) -> list[str]:
        """The shards that have been read since the last call, without those still read ahead."""
        spans = self.recorder.drain(goes_on=True).spans
        found = [data["shard"] for event, _, _, data in spans if event == "read"]
        return [name for name, _ in itertools.groupby(found)]


@contextmanager
def pair(
    layers: Sequence[ShardSpec], pinned: Sequence[ShardSpec] = (), shards: float = 1, *, read_ahead: bool = True
) -> Iterator[Pair]:
    made = Pair(layers, pinned, shards, read_ahead=read_ahead)
    try:
        yield made
    finally:
        made.loader.close()
        made.source._leases._connection.close()


@pytest.mark.parametrize("shards", [1.0, 1.5, 3.0])
@pytest.mark.parametrize("read_ahead", [True, False], ids=["read ahead", "not ahead"])
def test_passes_in_order_read_every_streamed_shard_once(layout: Layout, shards: float, read_ahead: bool) -> None:
    layers, pinned = layout.layers, layout.layers[1:4:2]
    with pair(layers, pinned, shards, read_ahead=read_ahead) as both:
        assert both.read() == ["layer.1", "layer.3"]
        both.run((*layers, *layers[ENCODER:], *layers[ENCODER:]))
        rounds = ["layer.0", *["layer.2", "layer.4", "layer.5"] * 3]
        assert both.read()[: len(rounds)] == rounds


def test_the_next_shard_is_asked_for_before_this_one_is_computed(layout: Layout) -> None:
    """Without read-ahead by the loader, so that what has been asked for can be told from what comes anyway."""
    with pair(layout.layers, shards=2, read_ahead=False) as both, both.source.lease("layer.0"):
        give_up = time.monotonic() + SOON_S
        while not both.loader._is_awaited:
            assert time.monotonic() < give_up
            time.sleep(0.005)
        assert list(both.source._leases._asked) == ["layer.1"]


@pytest.mark.parametrize("pinned", [(), (0,), (0, 1), (2, 3, 4, 5), (0, 2, 3, 4, 5), (1, 2, 3, 4)])
def test_the_encoder_is_read_once_a_prompt(layout: Layout, pinned: tuple[int, ...]) -> None:
    layers = layout.layers
    streamed = [spec.name for spec in layers[:ENCODER] if layers.index(spec) not in pinned]
    with pair(layers, [layers[index] for index in pinned], 1.0) as both:
        both.read()
        for _ in range(3):
            both.run((*layers, *layers[ENCODER:], *layers[ENCODER:]))
            found = [name for name in both.read() if name in ("layer.0", "layer.1")]
            assert found == streamed


@pytest.mark.parametrize("shards", [1.0, 3.0])
def test_a_pass_that_breaks_off_is_followed_by_one_from_the_first_layer(layout: Layout, shards: float) -> None:
    layers = layout.layers[ENCODER:]
    with pair(layout.layers, shards=shards) as both:
        both.run(layout.layers)
        for count in (1, 3, 2):
            both.run(layers[:count])
            with pytest.raises(ZeroDivisionError), both.source.lease(layers[count].name):
                raise ZeroDivisionError
        both.run(layers)
        assert len(both.read()) < 2 * len(layers) * 5


def test_a_shard_that_the_loader_does_not_read_is_named(layout: Layout) -> None:
    with pair(layout.layers) as both:
        both.source._names += ("layer.77",)
        with pytest.raises(ActorFailure, match=r"the loader has no shard layer\.77 in its schedule"):
            both.run([ShardSpec("layer.77", ())])
        both.run(layout.layers)


def test_when_the_last_streamed_shard_is_pinned_again_nothing_is_asked_for(layout: Layout) -> None:
    layers = layout.layers
    with pair(layers, layers, 1.0) as both:
        both.read()
        assert both.source.hold(len(layers) - 1) == len(layers) - 1
        assert both.source.hold(len(layers)) == len(layers) - 1  # it is pinned when it is next leased
        both.run((*layers, *layers))
        assert both.source.hold(len(layers)) == len(layers)
        assert len(both.read()) == 1
        both.run(layers)
        assert both.read() == []


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_pins_may_change_between_any_two_passes_and_passes_may_break_off(layout: Layout, data: st.DataObject) -> None:
    layers = layout.layers
    pinned = [layers[index] for index in sorted(data.draw(st.sets(st.integers(0, 5)), "pinned"))]
    shards = data.draw(st.floats(1.0, 4.0), "window")
    with pair(layers, pinned, shards, read_ahead=data.draw(st.booleans(), "ahead")) as both:
        for _ in range(data.draw(st.integers(1, 6), "passes")):
            both.source.hold(data.draw(st.integers(0, len(pinned)), "hold"))
            first = 0 if data.draw(st.booleans(), "a new prompt") else ENCODER
            both.run(layers[first : data.draw(st.integers(first, 6), "breaks off before")])
