"""The verifier's side of the loader: leases of shards, and private copies of the pinned ones."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from llmcad_actors.actors.arena import mapped
from llmcad_actors.actors.calls import fetch
from llmcad_actors.actors.loader import Place
from llmcad_actors.errors import ActorFailure
from llmcad_actors.storage.layout import ShardSpec
from llmcad_actors.storage.reader import AlignedBuffer

SHARD_TIMEOUT_S = 120.0
ALIGNMENT = 64


class PinnedShard:
    """A shard's tensors in anonymous memory of this process, each aligned to 64 bytes; `close` gives it back."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        offsets = np.cumsum([0, *(-(-a.nbytes // ALIGNMENT) * ALIGNMENT for a in arrays.values())])
        self._buffer = AlignedBuffer(max(int(offsets[-1]), 1))
        self.arrays: dict[str, np.ndarray] = {}
        for (name, array), offset in zip(arrays.items(), offsets[:-1].tolist(), strict=True):
            self.arrays[name] = self._buffer.view(offset, array.nbytes)
            self.arrays[name][:] = array

    def close(self) -> None:
        self.arrays.clear()
        self._buffer.close()


class LeasedShards:
    """A `ShardSource` over the loader actor. One lease is asked for ahead of the one in use."""

    def __init__(self, loader: Any, num_shards: int, opening: str | None = None) -> None:
        """`num_shards`: of a pass. opening: the first streamed shard of an encoder, which not every pass asks for."""
        self._loader = loader
        self._num_shards = num_shards
        self._opening = opening
        self._window = mapped(fetch(loader.arena.remote(), SHARD_TIMEOUT_S, "the window"))
        self._ahead: Any = None
        self._pinned: dict[str, PinnedShard] = {}

    def pin(self, specs: Sequence[ShardSpec]) -> int:
        """Take the loader's prelude into private memory; returns the bytes pinned."""
        for spec in specs:
            with self._next(spec.name, ask_ahead=spec is not specs[-1]) as arrays:
                self._pinned[spec.name] = PinnedShard(arrays)
        return sum(spec.nbytes for spec in specs)

    @contextmanager
    def lease(self, name: str) -> Iterator[Mapping[str, np.ndarray]]:
        """The shard `name` as bytes by tensor name, read-only, until the block ends."""
        if name in self._pinned:
            yield self._pinned[name].arrays
            return
        if name == self._opening:
            fetch(self._loader.open.remote(), SHARD_TIMEOUT_S, "the loader")
        with self._next(name, ask_ahead=True) as arrays:
            yield arrays

    @contextmanager
    def _next(self, name: str, *, ask_ahead: bool) -> Iterator[dict[str, np.ndarray]]:
        lease, places = self._take(name)
        try:
            if ask_ahead:
                self._ahead = self._ask()
            yield {tensor: self._window[start : start + nbytes] for tensor, start, nbytes in places}
        finally:  # from now on the loader writes over it
            self._loader.release.remote(lease)

    def _take(self, name: str) -> tuple[int, tuple[Place, ...]]:
        """The lease of shard `name`: the loader's next one, or, after a pass that broke off, one soon after."""
        for _ in range(self._num_shards):
            request, self._ahead = self._ahead or self._ask(), None
            lease, found, places = fetch(request, SHARD_TIMEOUT_S + 10, f"shard {name}")
            if found == name:
                return lease, places
            self._loader.release.remote(lease)
        raise ActorFailure(f"the loader does not read shard {name}")

    def _ask(self) -> Any:
        return self._loader.next.remote(SHARD_TIMEOUT_S)
