"""The ports with a recorder in between: what passes through is noted, nothing is changed."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

from llmcad_actors.core.request import Request
from llmcad_actors.core.round import Check, Drafting, Grown, PassReport
from llmcad_actors.core.trace import Recorder
from llmcad_actors.messages import DraftOrder
from llmcad_actors.ports import Drafter, ShardSource, Verifier


class TracedDrafter:
    """A `Drafter`; notes each round's drafting as the coordinator sees it."""

    def __init__(self, drafter: Drafter, recorder: Recorder) -> None:
        self._drafter = drafter
        self._recorder = recorder

    async def grow(self, order: DraftOrder) -> Drafting:
        started = self._recorder.now()
        grown = await self._drafter.grow(order)
        head_start = any(each.head_start for each in grown.trees.values())
        self._recorder.add("grow", started, steps=grown.steps, drafted=grown.drafted, head_start=head_start)
        return grown

    async def extend(self) -> Grown:
        return await self._drafter.extend()


class TracedVerifier:
    """A `Verifier`; notes every submission of the request that is followed, the wait for it, and its verdict."""

    def __init__(self, verifier: Verifier, recorder: Recorder) -> None:
        self._verifier = verifier
        self._recorder = recorder
        self.followed = -1  # the request's number

    async def change(self, ended: Sequence[int], joined: Mapping[int, Request]) -> Mapping[int, int]:
        return await self._verifier.change(ended, joined)

    async def verify(self, checks: Sequence[Check]) -> PassReport:
        started = self._recorder.now()
        report = await self._verifier.verify(checks)
        self._recorder.add("verify", started, nodes=sum(len(check.tree) for check in checks))
        verdict = report.verdicts.get(self.followed)
        if verdict is not None:
            (tree,) = (check.tree for check in checks if check.number == self.followed)
            self._recorder.add("submission", started, started, tree=tree)
            self._recorder.mark("verdict", path=verdict.path, bonus=verdict.bonus, stopped=verdict.stopped)
        return report


class TracedShards:
    """A `ShardSource`; notes how long a shard was waited for (stall) and used (compute)."""

    def __init__(self, source: ShardSource, recorder: Recorder) -> None:
        self._source = source
        self._recorder = recorder

    @contextmanager
    def lease(self, name: str) -> Iterator[Mapping[str, np.ndarray]]:
        asked = self._recorder.now()
        with self._source.lease(name) as arrays:
            given = self._recorder.now()
            self._recorder.add("stall", asked, given, shard=name)
            yield arrays
            self._recorder.add("compute", given, shard=name)
