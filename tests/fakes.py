"""Real classes that stand in for the world.

Weights from memory; a verifier whose target is a function of the tokens; drafters that propose what they are told;
and the real models as ports, without actors.
"""

import asyncio
import gc
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np

from llmcad_actors.core.acceptance import walk
from llmcad_actors.core.costs import Costs
from llmcad_actors.core.fallback import AdaptiveConfidence, Outcome, Policy
from llmcad_actors.core.round import Grown, PassStats, Submission, Verdict
from llmcad_actors.core.tree import ROOT, TokenTree
from llmcad_actors.errors import DeadlineError
from llmcad_actors.models.draft import Draft
from llmcad_actors.models.target import Target
from llmcad_actors.storage.layout import Layout
from llmcad_actors.storage.reader import read_bytes

Tokens = tuple[int, ...]
Choose = Callable[[Tokens], int]
"""A target as a function: the token after these."""


class MemoryShards:
    """A `ShardSource` that holds everything, lends copies, and knows which of them are still in use."""

    def __init__(self, layout: Layout) -> None:
        self._shards = {spec.name: {i.name: np.array(read_bytes(i)) for i in spec.tensors} for spec in layout.shards}
        self.asked: list[str] = []
        self.num_open = 0
        self.late: set[str] = set()  # shards that do not come
        self.broken: set[str] = set()  # shards that come without one of their tensors
        self._lent: list[weakref.ref[np.ndarray]] = []

    @contextmanager
    def lease(self, name: str) -> Iterator[Mapping[str, np.ndarray]]:
        self.asked.append(name)
        if name in self.late:
            raise DeadlineError(f"shard {name} did not come within 0 s")
        arrays = {key: _read_only_copy(array) for key, array in self._shards[name].items()}
        if name in self.broken:
            arrays.popitem()
        self._lent += [weakref.ref(array) for array in arrays.values()]
        self.num_open += 1
        try:
            yield arrays
        finally:
            self.num_open -= 1

    def num_alive(self) -> int:
        """Lent arrays that something still refers to."""
        gc.collect()
        return sum(ref() is not None for ref in self._lent)


class FunctionVerifier:
    """A `Verifier` whose target is a function. A pass takes `turns` turns of the event loop, and says `seconds`."""

    def __init__(self, choose: Choose, *, turns: int = 0, seconds: float = 100.0) -> None:
        self._choose = choose
        self._turns = turns
        self._seconds = seconds
        self._tokens: Tokens = ()
        self._stop: frozenset[int] = frozenset()
        self.trees: list[TokenTree] = []
        self.num_running = 0

    async def begin(self, prompt: Tokens, stop_tokens: Tokens, max_new_tokens: int) -> int:
        self._tokens, self._stop = prompt, frozenset(stop_tokens)
        return 0

    async def verify(self, tree: TokenTree) -> Verdict:
        self.trees.append(tree)
        self.num_running += 1
        try:
            for _ in range(self._turns):
                await asyncio.sleep(0)
        finally:
            self.num_running -= 1
        choices = [self._choose((*self._tokens, *tokens_to(tree, node))) for node in range(ROOT, len(tree))]
        accepted = walk(tree, choices, self._stop)
        self._tokens += accepted.emitted(tree)
        seconds = self._seconds
        stats = PassStats(seconds, stall_s=0.75 * seconds, compute_s=0.25 * seconds, rows=len(tree) + 1)
        return Verdict(accepted.path, accepted.bonus, accepted.stopped, stats)


class FunctionDrafter:
    """A `Drafter` that proposes `propose(committed tokens)`. It can draft `slices` slices ahead."""

    def __init__(self, propose: Callable[[Tokens], TokenTree], *, slices: int = 0) -> None:
        self._propose = propose
        self._slices = slices
        self._ahead = 0
        self._tree = TokenTree.empty()
        self.tokens: Tokens = ()

    async def begin(self, prompt: Tokens) -> None:
        self.tokens, self._tree, self._ahead = prompt, TokenTree.empty(), 0

    async def grow(self, verdicts: Sequence[Verdict], policy: Policy, costs: Costs) -> Submission:
        for verdict in verdicts:
            self.tokens += (*self._tree.tokens[list(verdict.path)].tolist(), verdict.bonus)
            self._tree = TokenTree.empty()
        head_start, self._ahead = self._ahead > 0, 0
        self._tree = self._propose(self.tokens)
        return Submission(
            self._tree, confidence=0.5, steps=1, drafted=len(self._tree), seconds=0.5, head_start=head_start
        )

    async def extend(self) -> Grown:
        await asyncio.sleep(0)
        self._ahead += 1
        return Grown(steps=1, drafted=2, can_go_on=self._ahead < self._slices)


@dataclass(frozen=True)
class Scripted(AdaptiveConfidence):
    """Drafts in those passes that it is told to; in all when there is nothing more to read."""

    drafts: tuple[bool, ...] = ()

    def should_draft(self, costs: Costs, unseen: int, left: int) -> bool:
        return not self.drafts or self.drafts[0]

    def after(self, outcome: Outcome) -> "Scripted":
        return replace(AdaptiveConfidence.after(self, outcome), drafts=self.drafts[1:])


class TickingClock:
    """Every look takes a second."""

    def __init__(self) -> None:
        self._now = 0.0

    def now(self) -> float:
        self._now += 1.0
        return self._now


class LocalVerifier:
    """The real target as a `Verifier`, in this process."""

    def __init__(self, target: Target) -> None:
        self._target = target

    async def begin(self, prompt: Tokens, stop_tokens: Tokens, max_new_tokens: int) -> int:
        return self._target.begin(prompt, stop_tokens, max_new_tokens)

    async def verify(self, tree: TokenTree) -> Verdict:
        return await asyncio.to_thread(self._target.verify, tree)


class LocalDrafter:
    """The real draft as a `Drafter`, in this process."""

    def __init__(self, draft: Draft, slice_steps: int = 2) -> None:
        self._draft = draft
        self._slice_steps = slice_steps

    async def begin(self, prompt: Tokens) -> None:
        self._draft.begin(prompt)

    async def grow(self, verdicts: Sequence[Verdict], policy: Policy, costs: Costs) -> Submission:
        return self._draft.grow(verdicts, policy, costs)

    async def extend(self) -> Grown:
        await asyncio.sleep(0)
        return self._draft.extend(self._slice_steps)


def silent(tokens: Tokens) -> TokenTree:
    """Proposes nothing."""
    return TokenTree.empty()


def perfect(choose: Choose, depth: int) -> Callable[[Tokens], TokenTree]:
    """Proposes what the target will say, `depth` tokens of it."""

    def propose(tokens: Tokens) -> TokenTree:
        ahead: list[int] = []
        for _ in range(depth):
            ahead.append(choose((*tokens, *ahead)))
        return chain(ahead)

    return propose


def random_trees(seed: int, vocab: int, max_nodes: int = 12) -> Callable[[Tokens], TokenTree]:
    """Proposes any tree at all, depending on the number of tokens alone."""

    def propose(tokens: Tokens) -> TokenTree:
        rng = np.random.default_rng([seed, len(tokens)])
        places: dict[tuple[int, int], None] = {}
        for _ in range(int(rng.integers(max_nodes + 1))):
            places[int(rng.integers(-1, len(places))), int(rng.integers(vocab))] = None
        return TokenTree.build([token for _, token in places], [parent for parent, _ in places], [-1.0] * len(places))

    return propose


def chain(tokens: Sequence[int]) -> TokenTree:
    """One branch."""
    return TokenTree.build(tokens, range(-1, len(tokens) - 1), [-0.5] * len(tokens))


def tokens_to(tree: TokenTree, node: int) -> Tokens:
    """The tokens from below the root down to `node`."""
    return tuple(tree.tokens[list(tree.path(node))].tolist())


def _read_only_copy(array: np.ndarray) -> np.ndarray:
    copy = array.copy()
    copy.flags.writeable = False
    return copy
