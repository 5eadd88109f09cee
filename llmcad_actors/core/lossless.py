"""Is a text the target's own? What `Engine.check_lossless` found: the text beside plain decoding, one token a pass."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MANTISSA_BITS = {"float32": 23, "bfloat16": 7}
ROUNDING_STEPS = {"float32": 32, "bfloat16": 8}
"""Two logits that are so close may change places by rounding: in steps of the computing type at their size."""


def parting(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    """Index of the first token that is not the same, or that only one of the texts has; None for equal texts."""
    pairs = enumerate(itertools.zip_longest(ours, theirs))
    return next((at for at, (a, b) in pairs if a != b), None)


@dataclass(frozen=True, slots=True)
class Difference:
    """Where a text parts from the plain one: the token that it has there, and the plain text's."""

    position: int  # of the first token that differs, from 0
    token_ids: tuple[int | None, ...]  # None: that text ends before
    texts: tuple[str | None, ...]  # of these tokens
    logits: tuple[float, ...] | None  # of these tokens, by the target; None where one text ends before

    @property
    def gap(self) -> float | None:
        return None if self.logits is None else abs(self.logits[0] - self.logits[1])

    def gap_in_steps(self, dtype: str) -> float | None:
        """The gap in steps of `dtype` at the logits' size; None where there is none, or a token is ruled out."""
        if self.logits is None or not all(map(math.isfinite, self.logits)):
            return None
        _, exponent = math.frexp(max(map(abs, self.logits)))
        return abs(self.logits[0] - self.logits[1]) / 2.0 ** (exponent - 1 - MANTISSA_BITS[dtype])

    def as_dict(self, dtype: str) -> dict[str, Any]:
        """null for logits of minus infinity, which are of tokens that generation_config.json rules out."""
        steps = self.gap_in_steps(dtype)
        logits = None if self.logits is None else [x if math.isfinite(x) else None for x in self.logits]
        return {
            "position": self.position,
            "token_ids": list(self.token_ids),
            "texts": list(self.texts),
            "logits": logits,
            "gap": None if steps is None else self.gap,
            "gap_in_steps": steps,
        }


@dataclass(frozen=True, slots=True)
class LosslessCheck:
    """A text beside what the target alone, one token a pass, makes of the same prompt."""

    num_tokens: int  # compared, the one that differs included
    dtype: str  # that the target computes in
    difference: Difference | None = None

    @property
    def is_same(self) -> bool:
        return self.difference is None

    @property
    def holds(self) -> bool:
        """The text is the plain one, or parts from it where two tokens are equally likely up to rounding."""
        if self.difference is None:
            return True
        steps = self.difference.gap_in_steps(self.dtype)
        return steps is not None and steps <= ROUNDING_STEPS[self.dtype]

    def as_dict(self) -> dict[str, Any]:
        """The JSON schema."""
        difference = None if self.difference is None else self.difference.as_dict(self.dtype)
        values = {"same": self.is_same, "holds": self.holds, "num_tokens": self.num_tokens, "dtype": self.dtype}
        return values | {"difference": difference}

    def __str__(self) -> str:
        """One line for people."""
        if (found := self.difference) is None:
            tokens = "1 token" if self.num_tokens == 1 else f"{self.num_tokens} tokens"
            return f"checked: decoded plainly, the text is the same ({tokens})"
        ours, plain = ("the text's end" if text is None else repr(text) for text in found.texts)
        where = f"from token {found.position + 1} on: {ours}, decoded plainly {plain}"
        if self.holds:
            return (
                f"checked: the texts differ {where}; a tie, as their logits {_logits(found)} are the same up to "
                f"rounding in {self.dtype}"
                + ("" if self.dtype == "float32" else "; --dtype float32 knows no such ties")
            )
        gap = "" if found.logits is None else f"; their logits are {_logits(found)}, which rounding does not explain"
        return f"THE TEXTS DIFFER {where}{gap}. This must never happen: please report it, with the command and model."


def _logits(found: Difference) -> str:
    return " and ".join(f"{logit:.9g}" for logit in found.logits or ())
