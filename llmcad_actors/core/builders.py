"""Tree builders by the names that settings use."""

from collections.abc import Sequence

from llmcad_actors.core.best_first import BestFirst
from llmcad_actors.core.fixed_expansion import FixedExpansion
from llmcad_actors.core.growth import TreeBuilder
from llmcad_actors.core.pacer import BranchPacer


def make_builder(
    kind: str, max_nodes: int, batch: int, children: int, widths: Sequence[int], sharpens: bool = False
) -> TreeBuilder:
    """`kind`: "best-first", "pacer" or "fixed"; each takes of the other arguments what it needs."""
    if kind == "best-first":
        return BestFirst(max_nodes, batch, children, sharpens)
    if kind == "pacer":
        return BranchPacer(max_nodes, batch=batch)
    if kind == "fixed":
        return FixedExpansion(widths, batch)
    raise ValueError(f"no tree builder is called {kind!r}")
