"""What the decode loop and the models ask of the world. Small protocols; the fakes in tests/ are real classes.

Requests go by their numbers, which are given once and never again.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import numpy as np

from llmcad_actors.core.request import Request
from llmcad_actors.core.round import Check, Drafting, Grown, PassReport
from llmcad_actors.messages import DraftOrder


class Drafter(Protocol):
    """Grows token trees with the draft model, those of all requests in shared steps."""

    async def grow(self, order: DraftOrder) -> Drafting:
        """Commit the verdicts, grow until the policy says verify, and hand over the trees.

        The first verdict of a request is of the tree that was handed over last, if one was; the others are of passes
        that had no tree, and are caught up with.
        """

    async def extend(self) -> Grown:
        """Grow provisionally for a few steps, beyond the trees that are being verified."""


class Verifier(Protocol):
    """Checks token trees with the target model."""

    async def change(self, ended: Sequence[int], joined: Mapping[int, Request]) -> Mapping[int, int]:
        """Free the rows of requests that have ended, then begin those that join.

        Returns how many tokens of each joined prompt need no computing, as they are part of a text that is held.
        """

    async def verify(self, checks: Sequence[Check]) -> PassReport:
        """One pass. The accepted paths and the bonus tokens are committed."""


class ShardSource(Protocol):
    """Lends the target's weights."""

    def lease(self, name: str) -> AbstractContextManager[Mapping[str, np.ndarray]]:
        """The shard `name` as bytes by tensor name (uint8, read-only), until the block ends.

        Shards are asked for in the order of the pass. Raises `DeadlineError` when one does not come in time.
        """


class Clock(Protocol):
    def now(self) -> float:
        """Seconds on a monotonic clock."""
