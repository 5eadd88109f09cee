"""Positions for decoders that count them from the cache's length: BART's family and T5's.

In a token tree, a row's position is its depth's, not its place among the rows. Such a decoder takes no positions, so
they are handed over where it computes them: at its position embedding, or at T5's relative position bias.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


class TreePositions:
    """The positions of the rows that a decoder runs, and of those they may see."""

    def __init__(self, decoder: Any) -> None:
        self._queries = self._keys = torch.empty(0, dtype=torch.int64)
        if hasattr(decoder, "embed_positions"):
            decoder.embed_positions.forward = self._embedded(decoder.embed_positions.forward)
        else:
            attention = decoder.block[0].layer[0].SelfAttention
            attention.compute_bias = self._relative_bias(attention)

    @contextmanager
    def of(self, queries: np.ndarray, keys: np.ndarray) -> Iterator[None]:
        """Inside the block, the decoder's rows stand at `queries` [rows] and see `keys` [columns]."""
        self._queries, self._keys = torch.from_numpy(queries), torch.from_numpy(keys)
        yield

    def _embedded(self, forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """A position embedding's forward; what it says of positions is not listened to."""

        def run(ids: Any, past_key_values_length: int = 0, position_ids: Any = None) -> torch.Tensor:
            return forward(ids, past_key_values_length, position_ids=self._queries)

        return run

    def _relative_bias(self, attention: Any) -> Callable[..., torch.Tensor]:
        """T5Attention.compute_bias: [1, heads, rows, columns]; the counts it is given are not listened to."""

        def run(*counts: Any, **more: Any) -> torch.Tensor:
            buckets = attention._relative_position_bucket(
                self._keys[None] - self._queries[:, None],
                bidirectional=False,
                num_buckets=attention.relative_attention_num_buckets,
                max_distance=attention.relative_attention_max_distance,
            )
            bias: torch.Tensor = attention.relative_attention_bias(buckets)
            return bias.permute(2, 0, 1)[None]

        return run
