"""Logits that nothing can be chosen by: not a number, infinite, or nothing but minus infinity.

Weights that are broken make them, and sums that the computing type cannot hold. An arg max would answer all the same.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from llmcad_actors.core.acceptance import Choices
from llmcad_actors.errors import CheckpointError


def is_sound(highest: torch.Tensor) -> torch.Tensor:
    """Of each row's highest logit: whether the row can be chosen by. Single logits of minus infinity are fine."""
    return highest.isfinite()  # a maximum with a NaN in it is NaN


def not_finite(role: str, path: Path, dtype: torch.dtype) -> CheckpointError:
    """`role`: "target" or "draft"."""
    name = str(dtype).removeprefix("torch.")
    ways = [] if dtype == torch.float32 else ["compute with --dtype float32"]
    ways += ["check its files, or fetch it again"] + (["use --draft none"] if role == "draft" else [])
    return CheckpointError(
        f"the {role} {path} computes logits that are not finite (NaN or infinite) in {name}: its weights hold such "
        f"numbers, or their sums outgrow the type; {', or '.join(ways)}"
    )


class SoundChoices:
    """`Choices` that raise for a row which nothing can be chosen by, once it is asked for.

    A node off the accepted path may be unsound: plain decoding never meets it.
    """

    def __init__(self, choices: Choices, sound: torch.Tensor, error: Callable[[], CheckpointError]) -> None:
        """sound: [rows]."""
        self._choices = choices
        self._sound = sound
        self._error = error

    def __getitem__(self, row: int, /) -> int:
        if not self._sound[row]:
            raise self._error()
        return int(self._choices[row])
