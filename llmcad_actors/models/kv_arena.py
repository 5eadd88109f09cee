"""The keys and values of both models: one arena of rows, of which every text has a block.

Storage is taken once for the whole capacity; the kernel gives pages only where rows are written. Where the rows of a
pass go is said before it (`writing`); its mask keeps texts apart. Columns of a mask are rows of the arena.
"""

import mmap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from transformers.cache_utils import Cache, CacheLayerMixin


class Block:
    """Consecutive rows, from `start`; the arena may move it."""

    def __init__(self, start: int, size: int) -> None:
        self.start = start
        self.size = size

    @property
    def end(self) -> int:
        return self.start + self.size


class ArenaLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one layer, [1, heads, capacity, head_dim]."""

    is_sliding = False

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.destinations = torch.empty(0, dtype=torch.int64)  # of the pass's rows
        self.num_written = 0  # of them
        self.end = 0  # rows that the pass looks at

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.keys = _storage(key_states, self.capacity)
        self.values = _storage(value_states, self.capacity)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write rows [1, heads, rows, head_dim] to where they belong; returns views of all that the pass looks at."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        rows = key_states.shape[-2]
        places = self.destinations[self.num_written : self.num_written + rows]
        assert len(places) == rows, f"{rows} rows, and places for {len(places)}"
        self.keys[0].index_copy_(1, places, key_states[0])
        self.values[0].index_copy_(1, places, value_states[0])
        self.num_written += rows
        return self.keys[:, :, : self.end], self.values[:, :, : self.end]

    def get_seq_length(self) -> int:
        """Rows that stand before those which come next: the pass looks at `end` in all."""
        return self.end - len(self.destinations) + self.num_written

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.end, 0

    def get_max_length(self) -> int:
        return self.capacity


def _storage(like: torch.Tensor, capacity: int) -> torch.Tensor:
    """Zeros, as a mask hides rows that were never written, and does not make numbers of what are none.

    Of the kernel's own, which gives pages only where rows are written: torch writes all zeros at once, and numpy asks
    for huge pages, which take most of the storage with the first rows.
    """
    batch, heads, _, head_dim = like.shape
    nbytes = batch * heads * capacity * head_dim * like.element_size()
    storage = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(storage, dtype=torch.uint8).view(like.dtype).view(batch, heads, capacity, head_dim)


class Arena(Cache):  # type: ignore[misc]
    """`capacity` rows in each of `num_layers` layers, and the blocks that they are given out in.

    Behind the last block there is always room for `scratch` rows, which belong to nobody.
    """

    def __init__(self, num_layers: int, capacity: int, scratch: int = 0) -> None:
        super().__init__(layers=[ArenaLayer(capacity + scratch) for _ in range(num_layers)])
        self.capacity = capacity
        self.positions = np.zeros(capacity + scratch, np.int64)  # in its text, of each row
        self._blocks: list[Block] = []  # by start

    @property
    def num_taken(self) -> int:
        """Rows that are given out."""
        return sum(block.size for block in self._blocks)

    @property
    def end(self) -> int:
        """Behind it no row is given out."""
        return self._blocks[-1].end if self._blocks else 0

    def fits(self, size: int) -> bool:
        return self.num_taken + size <= self.capacity

    def take(self, size: int) -> Block:
        """A block of so many rows, at the lowest place; blocks are moved together where none is large enough.

        Raises ValueError where there is no room.
        """
        if not self.fits(size):
            raise ValueError(f"the cache holds {self.capacity} rows, {self.num_taken + size} were asked for")
        start = self._gap(size)
        if start + size > self.capacity:
            self._move_together()
            start = self.end
        block = Block(start, size)
        self._blocks.append(block)
        self._blocks.sort(key=lambda each: each.start)
        return block

    def give_back(self, block: Block) -> None:
        self._blocks.remove(block)

    def resize(self, block: Block, size: int) -> None:
        """The block's rows stay, as far as they fit. Raises ValueError where there is no room."""
        following = [each.start for each in self._blocks if each.start >= block.end]
        if size > block.size and block.start + size > min(following, default=self.capacity):
            larger = self.take(size) if self.fits(size) else self._at_the_end(block, size)
            if larger is not block:
                self.copy(range(block.start, block.end), larger.start)
                self.give_back(block)
                block.start = larger.start
                self._blocks[self._blocks.index(larger)] = block
        block.size = size

    def _at_the_end(self, block: Block, size: int) -> Block:
        """The block, moved to where it can grow."""
        if not self.fits(size - block.size):
            raise ValueError(f"the cache holds {self.capacity} rows, {self.num_taken + size - block.size} are needed")
        self._move_together()
        order = [*(each for each in self._blocks if each is not block), block]
        rows = [np.arange(each.start, each.end) for each in order]
        self._permute(order, np.concatenate(rows))
        return block

    def _permute(self, order: list[Block], rows: np.ndarray) -> None:
        self.copy(rows, 0)
        start = 0
        for each in order:
            each.start, start = start, start + each.size
        self._blocks = order

    def _gap(self, size: int) -> int:
        """Where so many rows are free, or the end."""
        start = 0
        for block in self._blocks:
            if block.start - start >= size:
                break
            start = block.end
        return start

    def _move_together(self) -> None:
        start = 0
        for block in self._blocks:
            if block.start != start:
                self.copy(range(block.start, block.end), start)
                block.start = start
            start = block.end

    @torch.inference_mode()
    def copy(self, rows: Sequence[int] | np.ndarray, start: int) -> None:
        """Rows `rows` become rows start, start + 1, ...; what of both overlaps is read before it is written."""
        source = np.asarray(rows, np.int64)
        if not len(source) or np.array_equal(source, np.arange(start, start + len(source))):
            return
        self.positions[start : start + len(source)] = self.positions[source]
        index = torch.from_numpy(source)
        for layer in self.layers:
            if layer.is_initialized:
                for store in (layer.keys, layer.values):
                    store[:, :, start : start + len(source)] = store.index_select(2, index)

    @contextmanager
    def writing(self, rows: np.ndarray, positions: np.ndarray, end: int) -> Iterator[None]:
        """Inside the block, a forward pass's rows go to `rows`, and see of the arena's what its mask shows of `end`."""
        self.positions[rows] = positions
        destinations = torch.from_numpy(np.asarray(rows, np.int64))
        for layer in self.layers:
            layer.destinations, layer.num_written, layer.end = destinations, 0, end
        yield


class Held(Protocol):
    """A text with rows in the arena."""

    tokens: list[int]
    cached: int  # rows that hold its first tokens
    block: Block


T = TypeVar("T", bound=Held)


class Shelf(Generic[T]):
    """The texts of an arena: those that go on, and those that have ended, whose rows may serve one that begins so."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._ended: list[T] = []  # the newest last
        self.texts: dict[int, T] = {}

    def rows_for(self, tokens: Sequence[int], size: int) -> tuple[Block, int]:
        """A block of so many rows, and how many of them hold the text's first tokens already.

        At least the last token is left to be run. Raises ValueError where there is no room.
        """
        held = [*self.texts.values(), *self._ended]
        shares = [common_prefix(text.tokens[: text.cached], tokens[:-1]) for text in held]
        shared = max(shares, default=0)
        donor = held[shares.index(shared)] if shared else None
        if donor in self._ended:
            self._ended.remove(donor)
            self._make_room(size - donor.block.size)
            self._arena.resize(donor.block, size)
            return donor.block, shared
        self._make_room(size)
        block = self._arena.take(size)
        if donor is not None:
            self._arena.copy(range(donor.block.start, donor.block.start + shared), block.start)
        return block, shared

    def end(self, number: int) -> None:
        """The text goes on no more. One that is not known has ended already."""
        if (text := self.texts.pop(number, None)) is not None:
            self._ended.append(text)

    def forget(self, keeps: Callable[[T], bool] = lambda text: False) -> None:
        """Hold no row of a text that has ended, but of those that `keeps` names."""
        for text in [each for each in self._ended if not keeps(each)]:
            self._ended.remove(text)
            self._arena.give_back(text.block)

    def _make_room(self, size: int) -> None:
        while self._ended and not self._arena.fits(size):
            self._arena.give_back(self._ended.pop(0).block)


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """How many leading tokens two sequences share."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))
