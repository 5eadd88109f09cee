"""What a sliding window takes from a tree's mask.

transformers hands a 4-D mask to every layer as it is, so the window must be in it. A window is over positions: a
tree node's is its depth's, not its row's. Models whose layers differ take one mask for each layer type.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from llmcad_actors.errors import CheckpointError
from llmcad_actors.families.families import family_of
from llmcad_actors.models.chunks import BuildMask, ChunkedMask

FULL, SLIDING = "full_attention", "sliding_attention"
Masks = torch.Tensor | dict[str, torch.Tensor]


@dataclass(frozen=True)
class SlidingWindows:
    """The sliding windows of a model."""

    window: int | None  # positions that a row sees, its own included; None: all
    by_layer_type: bool  # the model takes a mask for each layer type

    @classmethod
    def of(cls, config: Any) -> "SlidingWindows":
        """From transformers' config object. Raises CheckpointError for layer types that are not attention."""
        kind = family_of(config.to_dict()).sliding_windows
        if kind == "none":
            return cls(None, by_layer_type=False)
        window = getattr(config, "sliding_window", None) or None
        if kind == "all":
            return cls(window, by_layer_type=False)
        types = set(config.layer_types)
        if types - {FULL, SLIDING}:
            raise CheckpointError(
                f"config.json has layers of the type {min(types - {FULL, SLIDING})!r}; llmcad knows {FULL} and "
                f"{SLIDING}."
            )
        return cls(window if SLIDING in types else None, by_layer_type=True)

    def masks(self, mask: torch.Tensor, queries: np.ndarray, keys: np.ndarray) -> Masks:
        """What the model takes for the additive `mask` [1, 1, queries, keys] of rows at these positions.

        A row sees the keys that `mask` shows and that are less than a window away.
        """
        sliding = mask
        if self.window is not None:
            hidden = torch.from_numpy(keys[None] <= queries[:, None] - self.window)
            if hidden.any():
                sliding = mask.masked_fill(hidden, torch.finfo(mask.dtype).min)
        return {FULL: mask, SLIDING: sliding} if self.by_layer_type else sliding

    def chunked(self, build: BuildMask, queries: np.ndarray, keys: np.ndarray) -> Masks:
        """`masks` for the mask that `build` makes chunk by chunk."""

        def sliding(start: int, end: int) -> torch.Tensor:
            found = self.masks(build(start, end), queries[start:end], keys)
            return found[SLIDING] if isinstance(found, dict) else found

        full = ChunkedMask.of(len(queries), len(keys), build)
        windowed = full if self.window is None else ChunkedMask.of(len(queries), len(keys), sliding)
        return {FULL: full, SLIDING: windowed} if self.by_layer_type else windowed
