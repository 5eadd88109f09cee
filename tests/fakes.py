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
from llmcad_actors.core.best_first import BestFirst
from llmcad_actors.core.choosing import GREEDY, Choosing
from llmcad_actors.core.costs import Costs
from llmcad_actors.core.fallback import AdaptiveConfidence, Outcome, Policy
from llmcad_actors.core.growth import TreeBuilder
from llmcad_actors.core.request import Request
from llmcad_actors.core.round import Check, Drafting, Grown, PassReport, PassStats, Submission, Verdict
from llmcad_actors.core.rounds import Arrival, News, Rounds
from llmcad_actors.core.tree import ROOT, TokenTree
from llmcad_actors.errors import CheckpointError, DeadlineError
from llmcad_actors.loop import serve
from llmcad_actors.messages import DraftOrder, Event, Failed
from llmcad_actors.models.draft import Candidates, Draft, DraftModel, Rows
from llmcad_actors.models.draft import Text as DraftText
from llmcad_actors.models.target import Target, Text
from llmcad_actors.ports import Clock, Drafter, Verifier
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

    def __init__(self, choose: Choose, *, turns: int = 0, seconds: float = 100.0, held: int = 0) -> None:
        """held: tokens of every prompt that need no computing."""
        self._choose = choose
        self._turns = turns
        self._seconds = seconds
        self._held = held
        self._missing: dict[int, int] = {}  # tokens of prompts that have not been run
        self.texts: dict[int, tuple[Tokens, frozenset[int]]] = {}
        self.trees: list[TokenTree] = []
        self.passes: list[list[Check]] = []
        self.num_running = 0

    async def change(self, ended: Sequence[int], joined: Mapping[int, Request]) -> Mapping[int, int]:
        for number in ended:
            del self.texts[number]
        for number, request in joined.items():
            assert number not in self.texts
            self.texts[number] = request.prompt, frozenset(request.stop_tokens)
            self._missing[number] = len(request.prompt) - 1 - self._held
        return dict.fromkeys(joined, self._held)

    async def verify(self, checks: Sequence[Check]) -> PassReport:
        assert {check.number for check in checks} == self.texts.keys()
        self.trees += [check.tree for check in checks]
        self.passes.append(list(checks))
        self.num_running += 1
        try:
            for _ in range(self._turns):
                await asyncio.sleep(0)
        finally:
            self.num_running -= 1
        rows = sum(len(check.tree) + 1 for check in checks)
        seconds = self._seconds
        stats = PassStats(seconds, stall_s=0.75 * seconds, compute_s=0.25 * seconds, rows=rows)
        return PassReport(stats, {c.number: found for c in checks if (found := self._judge(c)) is not None})

    def _judge(self, check: Check) -> Verdict | None:
        if check.most_prompt is not None and self._missing[check.number] > check.most_prompt:
            assert not len(check.tree)
            self._missing[check.number] -= check.most_prompt
            return None
        self._missing[check.number] = 0
        (tokens, stop), tree = self.texts[check.number], check.tree
        choices = [self._choose((*tokens, *tokens_to(tree, node))) for node in range(ROOT, len(tree))]
        accepted = walk(tree, choices, stop)
        self.texts[check.number] = (*tokens, *accepted.emitted(tree)), stop
        return Verdict(accepted.path, accepted.bonus, accepted.stopped)


class FunctionDrafter:
    """A `Drafter` that proposes `propose(committed tokens)`. It can draft `slices` slices ahead."""

    def __init__(self, propose: Callable[[Tokens], TokenTree], *, slices: int = 0) -> None:
        self._propose = propose
        self._slices = slices
        self._ahead = 0
        self.texts: dict[int, Tokens] = {}
        self._trees: dict[int, TokenTree] = {}

    async def grow(self, order: DraftOrder) -> Drafting:
        for number in order.ended:
            del self.texts[number]
        self.texts |= {number: request.prompt for number, request in order.joined.items()}
        head_start, self._ahead = self._ahead > 0, 0
        for number, verdicts in order.verdicts.items():
            tree = self._trees.get(number, TokenTree.empty())
            for verdict in verdicts:
                self.texts[number] += (*tree.tokens[list(verdict.path)].tolist(), verdict.bonus)
                tree = TokenTree.empty()
            self._trees[number] = self._propose(self.texts[number])
        trees = {number: Submission(self._trees[number], head_start) for number in order.verdicts}
        drafted = sum(len(grown.tree) for grown in trees.values())
        return Drafting(trees, confidence=0.5, steps=1, drafted=drafted, seconds=0.5)

    async def extend(self) -> Grown:
        await asyncio.sleep(0)
        self._ahead += 1
        return Grown(steps=1, drafted=2, can_go_on=self._ahead < self._slices)


class Script:
    """An `Inbox`: the news before each round, in order; then, while anything runs, nothing; then the end."""

    def __init__(self, *news: News) -> None:
        self._news = list(news)

    async def take(self, *, wait: bool) -> News | None:
        await asyncio.sleep(0)
        return self._news.pop(0) if self._news else None


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

    async def change(self, ended: Sequence[int], joined: Mapping[int, Request]) -> Mapping[int, int]:
        for number in ended:
            self._target.end(number)
        return {number: self._target.begin(number, request) for number, request in joined.items()}

    async def verify(self, checks: Sequence[Check]) -> PassReport:
        return await asyncio.to_thread(self._target.verify, checks)


class LocalDrafter:
    """The real draft as a `Drafter`, in this process."""

    def __init__(self, draft: Draft, slice_steps: int = 2) -> None:
        self._draft = draft
        self._slice_steps = slice_steps

    async def grow(self, order: DraftOrder) -> Drafting:
        return self._draft.grow(order)

    async def extend(self) -> Grown:
        await asyncio.sleep(0)
        return self._draft.extend(self._slice_steps)


class OneText:
    """A target with one request at a time, as most tests need it."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self._number = 0
        self.stats = PassStats(0.0, 0.0, 0.0, 0)  # of the last pass

    def begin(
        self,
        prompt: Sequence[int],
        stop_tokens: Sequence[int] = (),
        count: int | None = None,
        choosing: Choosing = GREEDY,
    ) -> int:
        """The last one ends; returns the tokens of the prompt that the cache holds. count: None: all that has room."""
        self.target.end(self._number)
        self._number += 1
        if count is None:
            count = max(1, self.target._arena.capacity - len(prompt))
        request = Request(tuple(prompt), count, tuple(stop_tokens), choosing=choosing)
        return self.target.begin(self._number, request)

    @property
    def layout(self) -> Layout:
        return self.target.layout

    @property
    def text(self) -> Text:
        return self.target._shelf.texts[self._number]

    def verify(self, tree: TokenTree) -> Verdict:
        """Raises `CheckpointError` where the request is refused."""
        report = self.target.verify([Check(self._number, tree)])
        for why in report.refused.values():
            raise CheckpointError(why)
        self.stats = report.stats
        return report.verdicts[self._number]


@dataclass(frozen=True)
class OneGrown:
    """What `OneDraft` grew."""

    tree: TokenTree
    head_start: bool
    steps: int
    drafted: int
    seconds: float
    catch_up_s: float


class OneDraft:
    """A draft with one request at a time."""

    def __init__(self, draft: Draft) -> None:
        self.draft = draft
        self._number = 0
        self._joined: dict[int, Request] = {}
        self._ended: tuple[int, ...] = ()

    def begin(self, prompt: Sequence[int], choosing: Choosing = GREEDY) -> None:
        self._ended = (self._number,)
        self._number += 1
        self._joined = {self._number: Request(tuple(prompt), 40, (), choosing=choosing)}

    @property
    def builder(self) -> TreeBuilder:
        return self.draft._shelf.texts[self._number].builder

    def grow(self, verdicts: Sequence[Verdict], policy: Policy, costs: Costs) -> OneGrown:
        order = DraftOrder(self._joined, self._ended, {self._number: tuple(verdicts)}, policy, costs)
        self._joined, self._ended = {}, ()
        found = self.draft.grow(order)
        grown = found.trees[self._number]
        return OneGrown(grown.tree, grown.head_start, found.steps, found.drafted, found.seconds, found.catch_up_s)

    def extend(self, max_steps: int) -> Grown:
        return self.draft.extend(max_steps)


def run_prefix(model: DraftModel, prompt: Sequence[int]) -> Candidates:
    """The candidates after a prompt, which an unused draft model begins with and runs at once."""
    tokens = np.array(model.begin(prompt), np.int64)
    text = DraftText(Request(tuple(prompt), 1, ()), BestFirst(1), tokens.tolist(), model.arena.take(0), 0, None)
    return model.run([Rows(text, tokens, np.arange(len(tokens)))])[0]


async def decode(
    request: Request,
    drafter: Drafter | None,
    verifier: Verifier,
    rounds: Rounds,
    clock: Clock,
    emit: Callable[[Event], None],
) -> Rounds:
    """One request, served to its end. Raises what broke it."""

    def tell(number: int, event: Event) -> None:
        if isinstance(event, Failed):
            raise event.as_error()
        emit(event)

    news = News((Arrival(1, request, clock.now()),))
    fresh = replace(rounds, ended_for_draft=(), has_draft=True)  # as the ports are
    return await serve(Script(news), drafter, verifier, fresh, clock, tell)


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
