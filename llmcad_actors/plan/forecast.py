"""How long a pass will take: from what `llmcad doctor` measured on this machine, else as on a recent one. No torch."""

from dataclasses import dataclass, replace
from math import log2
from pathlib import Path
from typing import Self

from llmcad_actors.core.costs import beside_each_other, together
from llmcad_actors.machine.figures import ComputeFigures, figures_for

DISK_BYTES_PER_S = 2.0e9
MATMUL_FLOPS = {"float32": 1.5e11, "bfloat16": 4.0e11}
MEMORY_BYTES_PER_S = 1.0e10
"""What a recent solid-state disk, two cores with vector and bfloat16 instructions, and their memory do."""

TOKENS_PER_DOUBLING = 0.85
"""What every doubling of a tree brings, cautiously: a pair and its texts decide. The bundled pair brings more."""


@dataclass(frozen=True, slots=True)
class PassForecast:
    """One pass. `tokens` is assumed: it depends on the draft and on the text."""

    rows: int
    read_s: float  # alone
    compute_s: float  # alone
    tokens: float
    is_measured: bool  # by `llmcad doctor`, on this machine
    overlaps: bool = True  # a shard is read while another computes
    drafting_s: float = 0.0  # before it, beyond what reading hides

    @property
    def seconds(self) -> float:
        """Without drafting."""
        return float(together(*self.halves, overlaps=self.overlaps))

    @property
    def halves(self) -> tuple[float, float]:
        """Reading and computing, each beside the other."""
        return beside_each_other(self.read_s, self.compute_s, self.rows, overlaps=self.overlaps)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / (self.drafting_s + self.seconds)

    @property
    def seconds_per_token(self) -> float:
        return 1 / self.tokens_per_second


@dataclass(frozen=True, slots=True)
class Forecaster:
    """Passes of a checkpoint under a plan."""

    read_s: float  # of a pass
    parameters: int
    dtype: str  # that the target computes in
    figures: ComputeFigures | None
    overlaps: bool = True
    stored_bytes: int = 2  # of a parameter
    draft_step_s: float = 0.0
    hidden_s: float = 0.0  # drafting that costs nothing, as the next pass is being read

    @classmethod
    def of(
        cls,
        path: Path,
        *,
        read_bytes: int,
        read_limit: float | None,
        parameters: int,
        dtype: str,
        overlaps: bool = True,
        stored_bytes: int = 2,
    ) -> Self:
        """For the checkpoint at `path`. read_bytes: streamed in a pass; read_limit: bytes/s, None for the disk's."""
        figures = figures_for(path)
        rate = figures.disk.bytes_per_s if figures else DISK_BYTES_PER_S
        limited = rate if read_limit is None else min(rate, read_limit)
        compute = figures.compute if figures else None
        return cls(read_bytes / limited, parameters, dtype, compute, overlaps, stored_bytes)

    def plain(self) -> PassForecast:
        """One row, one token."""
        return self.of_rows(1)

    def best(self, max_nodes: int) -> PassForecast:
        """The tree of at most `max_nodes` that brings most tokens per second, as the fallback policy would find it.

        One row where drafting does not pay.
        """
        sizes = range(2, max_nodes + 2)
        trees = (self._of_tree(rows, 1 + TOKENS_PER_DOUBLING * log2(rows)) for rows in sizes)
        return max((self.plain(), *trees), key=lambda f: f.tokens_per_second)

    def of_rows(self, rows: int, tokens: float = 1.0) -> PassForecast:
        """A pass of so many rows, for so many tokens."""
        if self.figures is None:
            computing, moving = 2 * rows / MATMUL_FLOPS[self.dtype], self.stored_bytes / MEMORY_BYTES_PER_S
            compute_s = self.parameters * max(computing, moving)
        else:
            compute_s = self.figures.pass_seconds(rows, self.dtype, self.parameters, self.stored_bytes)
        return PassForecast(rows, self.read_s, compute_s, tokens, self.figures is not None, self.overlaps)

    def _of_tree(self, rows: int, tokens: float) -> PassForecast:
        """A draft step for each level that is accepted, and one more."""
        drafting_s = max(0.0, tokens * self.draft_step_s - self.hidden_s)
        return replace(self.of_rows(rows, tokens), drafting_s=drafting_s)
