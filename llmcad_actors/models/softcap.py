"""Soft-capped logits (Gemma 2)."""

from typing import Any

import torch

from llmcad_actors.families.families import family_of


def softcap_of(config: Any) -> float | None:
    """The cap in transformers' config object, or None."""
    return family_of(config.to_dict()).softcap(config.to_dict())


def soft_capped(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    """cap * tanh(logits / cap), in the order of operations of transformers: large logits become equal."""
    return logits if cap is None else torch.tanh(logits / cap) * cap
