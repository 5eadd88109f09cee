"""Real classes that stand in for the world: weights from memory, drafters that grow what they are told."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np

from llmcad_actors.core.costs import Costs
from llmcad_actors.core.fallback import Policy
from llmcad_actors.core.tree import TokenTree
from llmcad_actors.messages import Grown, PassStats, Submission, Verdict
from llmcad_actors.storage.layout import Layout
from llmcad_actors.storage.reader import read_bytes


class DirectShards:
    """A `ShardSource` that reads a shard when it is asked for; counts what is out."""

    def __init__(self, layout: Layout) -> None:
        self._specs = {spec.name: spec for spec in layout.shards}
        self.leased: list[str] = []
        self.open = 0

    @contextmanager
    def lease(self, name: str) -> Iterator[Mapping[str, np.ndarray]]:
        self.leased.append(name)
        self.open += 1
        try:
            yield {info.name: _read_only(read_bytes(info)) for info in self._specs[name].tensors}
        finally:
            self.open -= 1


def _read_only(data: object) -> np.ndarray:
    array = np.array(data, dtype=np.uint8)
    array.flags.writeable = False
    return array
