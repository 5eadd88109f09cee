"""The verifier's side of the loader: leases of shards, and private copies of the pinned ones."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from llmcad_actors.actors.arena import mapped
from llmcad_actors.actors.calls import fetch
from llmcad_actors.actors.channel import LEND_TIMEOUT_S, LeaseClient, Place
from llmcad_actors.errors import ActorFailure
from llmcad_actors.storage.direct import BLOCK
from llmcad_actors.storage.layout import ShardSpec
from llmcad_actors.storage.reader import AlignedBuffer

LOADER_TIMEOUT_S = 120.0  # of its own calls
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

    def __init__(self, loader: Any, names: Sequence[str], encoder: Sequence[str] = ()) -> None:
        """`names`: all shards of a pass. encoder: those of them that only a prompt's first pass asks for."""
        self._loader = loader
        self._names = tuple(names)
        self._encoder = tuple(encoder)
        self._window = mapped(fetch(loader.arena.remote(), LOADER_TIMEOUT_S, "the window"))
        self._leases = LeaseClient(fetch(loader.leases.remote(), LOADER_TIMEOUT_S, "the loader's address"))
        self._has_asked = False  # for the next shard
        self._pinned: dict[str, PinnedShard] = {}
        self._keepable: tuple[str, ...] = ()  # what was pinned at first; the large ones are kept longest
        self._wanted: frozenset[str] = frozenset()  # to be pinned again when they come by

    def pin(self, specs: Sequence[ShardSpec]) -> int:
        """Take the loader's prelude into private memory; returns the bytes pinned."""
        for spec in specs:
            with self._next(spec.name, ask_ahead=spec is not specs[-1]) as arrays:
                self._pinned[spec.name] = PinnedShard(arrays)
        self._keepable = tuple(spec.name for spec in sorted(specs, key=lambda spec: -spec.nbytes))
        return sum(spec.nbytes for spec in specs)

    def keep(self, count: int) -> int:
        """Keep `count` of the shards that were pinned at first; returns how many are held now. Between passes only.

        Those too many are given back to the system at once, the last of the pass first: the loader, which has read
        ahead, has not come to them. Those missing are pinned when they next come by.
        """
        kept = self._keepable[:count]
        self._wanted = frozenset(kept) - self._pinned.keys()
        dropped = [name for name in self._pinned if name not in kept]
        for name in dropped:
            self._pinned.pop(name).close()
        if dropped:
            self._stream()
        return len(self._pinned)

    @contextmanager
    def lease(self, name: str) -> Iterator[Mapping[str, np.ndarray]]:
        """The shard `name` as bytes by tensor name, read-only, until the block ends."""
        if name in self._pinned:
            yield self._pinned[name].arrays
            return
        if name == self._opening():
            fetch(self._loader.open.remote(), LOADER_TIMEOUT_S, "the loader")
        with self._next(name, ask_ahead=self._has_more_behind(name)) as arrays:
            if name in self._wanted:
                self._pin_again(name, arrays)
            yield arrays

    def _streamed(self) -> list[str]:
        return [name for name in self._names if name not in self._pinned]

    def _opening(self) -> str | None:
        """The first shard of the encoder that is streamed."""
        return next((name for name in self._encoder if name not in self._pinned), None)

    def _has_more_behind(self, name: str) -> bool:
        """Whether the loader will bring another shard by itself: round the circle, or further on in the encoder."""
        streamed = [n for n in self._streamed() if n not in self._wanted or n != name]
        circle = [n for n in streamed if n not in self._encoder]
        return bool(circle) or (name in streamed and name != streamed[-1])

    def _pin_again(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        self._pinned[name] = PinnedShard(arrays)
        self._wanted -= {name}
        self._stream()

    def _stream(self) -> None:
        """Tell the loader which shards are not pinned."""
        fetch(self._loader.stream.remote(self._streamed()), LOADER_TIMEOUT_S, "the loader's new order")

    @contextmanager
    def _next(self, name: str, *, ask_ahead: bool) -> Iterator[dict[str, np.ndarray]]:
        lease, places = self._take(name)
        try:
            if ask_ahead:
                self._ask()
            yield {tensor: self._window[start : start + nbytes] for tensor, start, nbytes in places}
        finally:  # from now on the loader writes over it
            self._leases.release(lease)

    def _take(self, name: str) -> tuple[int, tuple[Place, ...]]:
        """The lease of shard `name`: the loader's next, or one soon after, when a pass broke off or pins changed."""
        for _ in range(len(self._names) + len(self._window) // BLOCK):  # at most a circle, behind a full window
            if not self._has_asked:
                self._ask()
            self._has_asked = False
            lease, found, places = self._leases.take(LEND_TIMEOUT_S + 10, f"shard {name}")
            if found == name:
                return lease, places
            self._leases.release(lease)
        raise ActorFailure(f"the loader does not read shard {name}")

    def _ask(self) -> None:
        self._leases.ask()
        self._has_asked = True
