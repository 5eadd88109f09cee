"""The key/value cache of both models: a committed prefix, then rows of the tree in flight.

Storage is taken once for the whole capacity; the kernel gives pages only where rows are written. Rows are appended
in place. `keep` moves the accepted rows behind the committed prefix and forgets the others.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


class TreeCacheLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one layer, [1, heads, capacity, head_dim]; rows below `length` are in use."""

    is_sliding = False

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.keys = _storage(key_states, self.capacity)
        self.values = _storage(value_states, self.capacity)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append rows [1, heads, rows, head_dim]; returns views of everything in use."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        end = self.length + key_states.shape[-2]
        if end > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} rows, {end} were asked for")
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def keep(self, start: int, rows: torch.Tensor) -> None:
        """Rows `rows` (absolute indices, int64) become rows start, start + 1, ...; the rest is dropped."""
        if self.is_initialized and len(rows):
            assert self.keys is not None and self.values is not None
            for store in (self.keys, self.values):
                store[:, :, start : start + len(rows)] = store.index_select(2, rows)
        self.length = start + len(rows)

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return self.capacity


def _storage(like: torch.Tensor, capacity: int) -> torch.Tensor:
    batch, heads, _, head_dim = like.shape
    return torch.empty((batch, heads, capacity, head_dim), dtype=like.dtype)


class TreeCache(Cache):  # type: ignore[misc]
    """A cache of `num_layers` layers that all hold the same rows."""

    def __init__(self, num_layers: int, capacity: int) -> None:
        super().__init__(layers=[TreeCacheLayer(capacity) for _ in range(num_layers)])
        self.capacity = capacity

    @property
    def length(self) -> int:
        return int(self.layers[0].length)

    @torch.inference_mode()
    def keep(self, start: int, rows: Sequence[int]) -> None:
        """Keep the first `start` rows, then `rows` (absolute indices, ascending), in that order."""
        contiguous = list(rows) == list(range(start, start + len(rows)))
        index = torch.tensor([] if contiguous else list(rows), dtype=torch.int64)
        for layer in self.layers:
            if contiguous:
                layer.length = start + len(rows)
            else:
                layer.keep(start, index)
