"""What the decode loop and the models ask of the world. Small protocols; the fakes in tests/ are real classes."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import numpy as np

from llmcad_actors.core.costs import Costs
from llmcad_actors.core.fallback import Policy
from llmcad_actors.core.round import Grown, Submission, Verdict
from llmcad_actors.core.tree import TokenTree


class Drafter(Protocol):
    """Grows token trees with the draft model."""

    async def begin(self, prompt: tuple[int, ...]) -> None:
        """Start on a prompt; whatever was grown before is dropped. Nothing is run before a tree is asked for."""

    async def grow(self, verdicts: Sequence[Verdict], policy: Policy, costs: Costs) -> Submission:
        """Commit `verdicts`, grow until `policy` says verify, and hand over the tree.

        verdicts: of all passes since the last call, or since the start. The first is of the tree that was handed over
        then, if one was; the others are of passes that had no tree, and are caught up with.
        """

    async def extend(self) -> Grown:
        """Grow provisionally for a few steps, beyond the tree that is being verified."""


class Verifier(Protocol):
    """Checks token trees with the target model."""

    async def begin(self, prompt: tuple[int, ...], stop_tokens: tuple[int, ...], max_new_tokens: int) -> int:
        """Start on a prompt; returns how many of its tokens need no computing, as they were part of the last text.

        Only a target that forces its last token looks at `max_new_tokens`.
        """

    async def verify(self, tree: TokenTree) -> Verdict:
        """One pass over `tree`. The accepted path and the bonus token are committed."""


class ShardSource(Protocol):
    """Lends the target's weights."""

    def lease(self, name: str) -> AbstractContextManager[Mapping[str, np.ndarray]]:
        """The shard `name` as bytes by tensor name (uint8, read-only), until the block ends.

        Shards are asked for in the order of the pass. Raises `DeadlineError` when one does not come in time.
        """


class Clock(Protocol):
    def now(self) -> float:
        """Seconds on a monotonic clock."""
