"""How rows of a token tree go through a transformers model: a decoder alone, or an encoder and a decoder.

Target and draft both run their rows here. A stack knows positions, masks and caches; not where weights come from.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from transformers import DynamicCache, EncoderDecoderCache

from llmcad_actors.families.families import family_of
from llmcad_actors.families.generation_rules import start_token
from llmcad_actors.models.chunks import BuildMask
from llmcad_actors.models.kv_arena import Arena
from llmcad_actors.models.masks import SlidingWindows
from llmcad_actors.models.tree_positions import TreePositions

__all__ = ["DecoderOnly", "EncoderDecoder", "Stack", "stack_of", "start_token"]

AnyMask = torch.Tensor | BuildMask


class Stack(Protocol):
    """A model's way from token ids to final hidden states."""

    def begin(self, prompt: Sequence[int]) -> tuple[int, ...]:
        """Start on a prompt; returns the tokens that the decoder's text begins with."""

    def run(
        self, ids: torch.Tensor, mask: AnyMask, positions: np.ndarray, keys: np.ndarray, cache: Arena
    ) -> torch.Tensor:
        """Final hidden states [rows, hidden] of decoder rows `ids` [rows], whose keys and values go to `cache`.

        mask: additive, [1, 1, rows, columns], or what builds it, for layers that run in chunks; columns: the rows of
        the cache that the pass looks at. positions, keys: in the text, of the rows [rows] and of the columns [columns].
        """


def stack_of(model: Any, settings: Mapping[str, Any]) -> Stack:
    """The stack of a transformers model. settings: what decides about generating, for the decoder's first token."""
    if family_of(model.config.to_dict()).encoder is None:
        return DecoderOnly(model)
    return EncoderDecoder(model, start_token(settings, model.config.to_dict()))


class DecoderOnly:
    """The prompt is the beginning of the decoder's text."""

    def __init__(self, model: Any) -> None:
        self._base = model.base_model
        self._windows = SlidingWindows.of(model.config)

    def begin(self, prompt: Sequence[int]) -> tuple[int, ...]:
        return tuple(prompt)

    def run(
        self, ids: torch.Tensor, mask: AnyMask, positions: np.ndarray, keys: np.ndarray, cache: Arena
    ) -> torch.Tensor:
        masks = self._windows.masks if isinstance(mask, torch.Tensor) else self._windows.chunked
        output = self._base(
            input_ids=ids[None],
            attention_mask=masks(mask, positions, keys),  # type: ignore[arg-type]
            position_ids=torch.from_numpy(positions)[None],
            cache=cache,
            use_cache=True,
        )
        hidden: torch.Tensor = output.last_hidden_state[0]
        return hidden


class EncoderDecoder:
    """The encoder reads the prompt, once, before the decoder's first rows; the decoder's text is the output alone.

    Keys and values of the encoder's states (cross-attention) are computed in the same pass and kept with the prompt.
    """

    def __init__(self, model: Any, start: int) -> None:
        """`start`: the token that the decoder's text begins with."""
        base = model.base_model
        self._encoder, self._decoder = base.encoder, base.decoder
        self._start = start
        self._scale = model.config.d_model**-0.5 if getattr(model.config, "scale_decoder_outputs", False) else None
        self._positions = TreePositions(self._decoder)
        self._prompt: tuple[int, ...] = ()
        self._encoded: torch.Tensor | None = None  # [1, prompt, hidden]
        self._cross = DynamicCache()

    def begin(self, prompt: Sequence[int]) -> tuple[int, ...]:
        if tuple(prompt) != self._prompt:
            self._prompt = tuple(prompt)
            self._encoded, self._cross = None, DynamicCache()
        return (self._start,)

    def run(
        self, ids: torch.Tensor, mask: AnyMask, positions: np.ndarray, keys: np.ndarray, cache: Arena
    ) -> torch.Tensor:
        if self._encoded is None:
            self._encoded = self._encoder(input_ids=torch.tensor([self._prompt])).last_hidden_state
        with self._positions.of(positions, keys):
            output = self._decoder(
                input_ids=ids[None],
                attention_mask=mask if isinstance(mask, torch.Tensor) else mask(0, len(ids)),
                encoder_hidden_states=self._encoded,
                cache=EncoderDecoderCache(cache, self._cross),
                use_cache=True,
            )
        hidden: torch.Tensor = output.last_hidden_state[0]
        return hidden if self._scale is None else hidden * self._scale
