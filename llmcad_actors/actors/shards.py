"""The verifier's side of the loader: leases of shards, and private copies of the pinned ones."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any, Self

import numpy as np

from llmcad_actors.actors.arena import mapped
from llmcad_actors.actors.calls import fetch
from llmcad_actors.actors.channel import Address, LeaseClient
from llmcad_actors.actors.loader import LEND_TIMEOUT_S
from llmcad_actors.storage.layout import ShardSpec
from llmcad_actors.storage.reader import AlignedBuffer

LOADER_TIMEOUT_S = 120.0  # of its own calls
ANSWER_TIMEOUT_S = LEND_TIMEOUT_S + 10  # of a shard that was asked for: the loader's own deadline says more
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
    """A `ShardSource` over the loader's window. One lease is asked for ahead of the one in use."""

    @classmethod
    def of(cls, loader: Any, names: Sequence[str], encoder: Sequence[str] = ()) -> Self:
        """Over a loader actor."""
        window = mapped(fetch(loader.arena.remote(), LOADER_TIMEOUT_S, "the window"))
        return cls(window, fetch(loader.leases.remote(), LOADER_TIMEOUT_S, "the loader's address"), names, encoder)

    def __init__(self, window: np.ndarray, address: Address, names: Sequence[str], encoder: Sequence[str] = ()) -> None:
        """`names`: all shards of a pass, in its order. encoder: those that only a prompt's first pass asks for."""
        self._names = tuple(names)
        self._encoder = tuple(encoder)
        self._window = window
        self._leases = LeaseClient(address)
        self._pinned: dict[str, PinnedShard] = {}
        self._pinnable: tuple[str, ...] = ()  # what may be pinned; the first are held longest
        self._wanted: frozenset[str] = frozenset()  # to be pinned again when they are next leased

    def pin(self, specs: Sequence[ShardSpec], later: Sequence[str] = ()) -> int:
        """Take the loader's prelude into private memory; returns the bytes pinned.

        Of these, the large ones are held longest. later: what `hold` may pin besides, when there is more room.
        """
        names = [spec.name for spec in specs]
        for name, behind in zip_longest(names, names[1:]):
            with self._lent(name, behind) as arrays:
                self._pinned[name] = PinnedShard(arrays)
        self._pinnable = (*(spec.name for spec in sorted(specs, key=lambda spec: -spec.nbytes)), *later)
        return sum(spec.nbytes for spec in specs)

    def hold(self, count: int) -> int:
        """Hold `count` of the shards that may be pinned; returns how many are held now. Between passes only.

        Those too many are given back to the system at once, the last of the pass first: the loader, which has read
        ahead, has not come to them. Those missing are pinned when they are next leased.
        """
        held = self._pinnable[:count]
        self._wanted = frozenset(held) - self._pinned.keys()
        dropped = [name for name in self._pinned if name not in held]
        for name in dropped:
            self._pinned.pop(name).close()
        if dropped:
            self._leases.stream(self._streamed())
        return len(self._pinned)

    @contextmanager
    def lease(self, name: str) -> Iterator[Mapping[str, np.ndarray]]:
        """The shard `name` as bytes by tensor name, read-only, until the block ends."""
        if name in self._pinned:
            yield self._pinned[name].arrays
            return
        with self._lent(name, self._behind(name)) as arrays:
            if name in self._wanted:
                self._pin_again(name, arrays)
            yield arrays

    def _streamed(self) -> tuple[str, ...]:
        return tuple(name for name in self._names if name not in self._pinned)

    def _behind(self, name: str) -> str | None:
        """What is most likely leased after `name`: the next streamed shard of the pass, or the next pass's first.

        A new prompt's first pass begins with the encoder instead. None: `name` is the last that is streamed at all.
        """
        position = self._names.index(name)
        around = (*self._names[position + 1 :], *(n for n in self._names[: position + 1] if n not in self._encoder))
        stays = self._pinned.keys() | ({name} & self._wanted)
        return next((other for other in around if other not in stays), None)

    def _pin_again(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        self._pinned[name] = PinnedShard(arrays)
        self._wanted -= {name}
        self._leases.stream(self._streamed())

    @contextmanager
    def _lent(self, name: str, behind: str | None) -> Iterator[dict[str, np.ndarray]]:
        """behind: the shard to ask for meanwhile."""
        lease = self._leases.take(name, ANSWER_TIMEOUT_S)
        try:
            if behind is not None:
                self._leases.ask(behind)
            yield {tensor: self._window[start : start + nbytes] for tensor, start, nbytes in lease.places}
        finally:  # from now on the loader writes over it
            self._leases.release(lease.number)
