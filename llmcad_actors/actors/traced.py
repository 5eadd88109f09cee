"""The ports with a recorder in between: what passes through is noted, nothing is changed."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

from llmcad_actors.core.costs import Costs
from llmcad_actors.core.fallback import Policy
from llmcad_actors.core.round import Grown, Submission, Verdict
from llmcad_actors.core.trace import Recorder
from llmcad_actors.core.tree import TokenTree
from llmcad_actors.ports import Drafter, ShardSource, Verifier


class TracedDrafter:
    """A `Drafter`; notes each round's drafting as the coordinator sees it."""

    def __init__(self, drafter: Drafter, recorder: Recorder) -> None:
        self._drafter = drafter
        self._recorder = recorder

    async def begin(self, prompt: tuple[int, ...]) -> None:
        await self._drafter.begin(prompt)

    async def grow(self, verdicts: Sequence[Verdict], policy: Policy, costs: Costs) -> Submission:
        started = self._recorder.now()
        grown = await self._drafter.grow(verdicts, policy, costs)
        self._recorder.add("grow", started, steps=grown.steps, drafted=grown.drafted, head_start=grown.head_start)
        return grown

    async def extend(self) -> Grown:
        return await self._drafter.extend()


class TracedVerifier:
    """A `Verifier`; notes every submission, the wait for it, and its verdict."""

    def __init__(self, verifier: Verifier, recorder: Recorder) -> None:
        self._verifier = verifier
        self._recorder = recorder

    async def begin(self, prompt: tuple[int, ...], stop_tokens: tuple[int, ...], max_new_tokens: int) -> int:
        return await self._verifier.begin(prompt, stop_tokens, max_new_tokens)

    async def verify(self, tree: TokenTree) -> Verdict:
        self._recorder.mark("submission", tree=tree)
        started = self._recorder.now()
        verdict = await self._verifier.verify(tree)
        self._recorder.add("verify", started, nodes=len(tree))
        self._recorder.mark("verdict", path=verdict.path, bonus=verdict.bonus, stopped=verdict.stopped)
        return verdict


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
