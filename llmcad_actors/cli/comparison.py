"""A text with speculation beside the beginning of the same without: whether they are the same, and how much faster."""

from dataclasses import dataclass
from typing import Any

from llmcad_actors.core.lossless import parting
from llmcad_actors.results import Result


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two results of one prompt. Either may have been allowed fewer tokens than the other."""

    fast: Result
    plain: Result

    @property
    def difference(self) -> int | None:
        """Index of the first token that differs, or that only one of them has though the other was not cut short."""
        shorter = min(self.fast, self.plain, key=lambda result: len(result.token_ids))
        at = parting(self.fast.token_ids, self.plain.token_ids)
        return None if at == len(shorter.token_ids) and shorter.finish_reason == "length" else at

    @property
    def is_same(self) -> bool:
        return self.difference is None

    @property
    def seconds_per_token(self) -> float:
        return self.fast.stats.seconds / self.fast.stats.new_tokens

    @property
    def plain_seconds_per_token(self) -> float:
        return self.plain.stats.seconds / self.plain.stats.new_tokens

    @property
    def times_faster(self) -> float:
        return self.plain_seconds_per_token / self.seconds_per_token

    def as_dict(self) -> dict[str, Any]:
        """The figures of the JSON report."""
        return {
            "seconds_per_token": self.seconds_per_token,
            "plain_seconds_per_token": self.plain_seconds_per_token,
            "same_text": self.is_same,
            "times_faster": self.times_faster,
        }

    @property
    def verdict(self) -> str:
        """One paragraph for people."""
        if (at := self.difference) is not None:
            return (
                f"THE TEXTS DIFFER from token {at + 1} on, which must never happen: with speculation the text is "
                f"{self.fast.text!r}, without it {self.plain.text!r}. Please report this, with the command and model."
            )
        num = min(len(self.fast.token_ids), len(self.plain.token_ids))
        compared = "1 token" if num == 1 else f"{num} tokens"
        faster = f"{self.times_faster:.1f} times faster"
        if self.times_faster < 1:
            faster = f"{1 / self.times_faster:.1f} times slower"
        return f"Both texts are the same ({compared} compared), and speculation is {faster}."
