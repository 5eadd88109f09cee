"""A layer runs the rows of a pass in chunks, so that activations stay bounded however long the prompt is.

A row sees rows before it and itself, so what comes after a chunk need not be in the cache yet. The layer's weights stay
in place over all chunks, and only hidden states [1, rows, hidden] are kept from one layer to the next.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import nn

BuildMask = Callable[[int, int], torch.Tensor]
"""Rows `start` to `end` of an additive mask: [1, 1, end - start, columns]."""


KEPT_CHUNKS = 2
"""Of a mask: all of a pass over trees, as a rule."""


class ChunkedMask(torch.Tensor):
    """Stands for an additive mask [1, 1, rows, columns], which is built chunk by chunk.

    transformers hands a 4-D mask on to every layer without a look at its numbers.
    """

    _build: BuildMask
    _kept: dict[tuple[int, int], torch.Tensor]

    @classmethod
    def of(cls, rows: int, columns: int, build: BuildMask) -> Self:
        mask = torch.zeros(()).expand(1, 1, rows, columns).as_subclass(cls)
        mask._build = build
        mask._kept = {}
        return mask

    def rows_of(self, start: int, end: int) -> torch.Tensor:
        """Rows `start` to `end`, [1, 1, end - start, columns]. The last ones are kept: layers ask in turn."""
        if (start, end) not in self._kept:
            if len(self._kept) == KEPT_CHUNKS:
                self._kept.pop(next(iter(self._kept)))
            self._kept[start, end] = self._build(start, end)
        return self._kept[start, end]


def install(decoder: nn.Module, layers: nn.ModuleList, chunk_rows: int) -> None:
    """Make the layers, and the norm that `decoder` has behind them, run `chunk_rows` rows at a time."""
    norms = [module for module in decoder.children() if "norm" in type(module).__name__.lower()]
    for module in (*layers, *norms):
        module.forward = _in_chunks(module.forward, chunk_rows)


def _in_chunks(forward: Callable[..., Any], chunk_rows: int) -> Callable[..., Any]:
    def run(hidden: torch.Tensor, /, *args: Any, **kwargs: Any) -> Any:
        rows = hidden.shape[1]
        for start in range(0, rows, chunk_rows):
            end = min(start + chunk_rows, rows)
            more = [_part(value, rows, start, end) for value in args]
            named = {name: _part(value, rows, start, end) for name, value in kwargs.items()}
            result = forward(hidden[:, start:end], *more, **named)
            if end - start == rows:
                return result
            hidden[:, start:end] = result[0] if isinstance(result, tuple) else result
        return (hidden,) if isinstance(result, tuple) else hidden

    return run


def _part(value: Any, rows: int, start: int, end: int) -> Any:
    """What belongs to a chunk: of masks and of tensors [1, rows, ...]; all else as it is."""
    if isinstance(value, ChunkedMask):
        return value.rows_of(start, end)
    if isinstance(value, torch.Tensor) and value.ndim > 1 and value.shape[1] == rows:
        return value[:, start:end]
    if isinstance(value, tuple):
        return tuple(_part(each, rows, start, end) for each in value)
    return value
