"""Which shard to read next: a circle of shards, a window of bytes, leases still out.

A shard is absent, in flight (being read), ready, or leased. Reading follows the circle from the shard that the
verifier wants next, as far as the window reaches: past the last shard it goes on with the first, whose weights
depend on no token. The bytes in flight, ready and leased never exceed the window.

No deadlock: what is in flight or ready always runs from the wanted shard on without a gap, so when the wanted one
is absent, only leases hold bytes. A verifier that holds one lease and asks for the next is served if the window
takes the two largest shards. Knows no file and no thread: the caller serialises the calls.
"""

from collections import Counter
from collections.abc import Sequence

from llmcad_actors.errors import OverBudgetError


class Readahead:
    def __init__(self, sizes: Sequence[int], window_bytes: int) -> None:
        """`sizes`: bytes of the shards in the order of the pass. Raises OverBudgetError if one cannot fit."""
        if max(sizes, default=0) > window_bytes:
            raise OverBudgetError(f"a shard of {max(sizes)} bytes does not fit the window of {window_bytes}")
        self._sizes = tuple(sizes)
        self._window_bytes = window_bytes
        self._wanted = 0
        self._in_flight: set[int] = set()
        self._unwanted: Counter[int] = Counter()  # in flight since before a rewind: to be dropped when they come
        self._ready: set[int] = set()
        self._leased: Counter[int] = Counter()

    @property
    def held_bytes(self) -> int:
        """Bytes in flight, ready and leased: never more than the window."""
        once = sum(self._sizes[i] for i in self._in_flight | self._ready)
        return once + sum(self._sizes[i] * count for i, count in (self._unwanted + self._leased).items())

    @property
    def ready(self) -> frozenset[int]:
        return frozenset(self._ready)

    def next_to_read(self) -> int | None:
        """The shard to read now, counted as in flight from here on; None while there is no room."""
        for ahead in range(len(self._sizes)):
            shard = (self._wanted + ahead) % len(self._sizes)
            if shard in self._ready or shard in self._in_flight:
                continue
            if self.held_bytes + self._sizes[shard] > self._window_bytes:
                return None
            self._in_flight.add(shard)
            return shard
        return None

    def loaded(self, shard: int) -> bool:
        """A read has ended. False: nobody wants it any more, drop its bytes."""
        if self._unwanted[shard]:
            self._unwanted -= Counter([shard])
            return False
        self._in_flight.remove(shard)
        self._ready.add(shard)
        return True

    def lost(self, shard: int) -> None:
        """A read has failed, or a ready shard's bytes are gone: it will be read again."""
        if self._unwanted[shard]:
            self._unwanted -= Counter([shard])
        elif shard in self._in_flight:
            self._in_flight.remove(shard)
        else:
            self._ready.remove(shard)

    def leased(self, shard: int) -> None:
        """The verifier has taken the wanted shard, which must be ready; it wants the next one now."""
        if shard != self._wanted or shard not in self._ready:
            raise ValueError(f"shard {shard} cannot be leased: {self._wanted} is wanted, {set(self._ready)} ready")
        self._ready.remove(shard)
        self._leased[shard] += 1
        self._wanted = (shard + 1) % len(self._sizes)

    def released(self, shard: int) -> None:
        """A lease has ended; its bytes are free."""
        if not self._leased[shard]:
            raise ValueError(f"shard {shard} is not leased")
        self._leased -= Counter([shard])

    def rewind(self, shard: int = 0) -> tuple[int, ...]:
        """The verifier starts again at `shard`. Returns the ready shards, whose bytes the caller drops now."""
        dropped = tuple(sorted(self._ready))
        self._ready.clear()
        self._unwanted.update(self._in_flight)
        self._in_flight.clear()
        self._wanted = shard
        return dropped
