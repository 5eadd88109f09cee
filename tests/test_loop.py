"""The decode loop over fakes: every token is the target's, whatever the draft does and whenever it does it."""

import asyncio
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcad_actors.core.costs import CostModel, Costs
from llmcad_actors.core.fallback import AdaptiveConfidence, MarginalThroughput
from llmcad_actors.core.provisional import LEAST_STEPS
from llmcad_actors.core.request import Request
from llmcad_actors.core.round import Check, Drafting, Grown, PassReport, PassStats
from llmcad_actors.core.rounds import Arrival, Limits, News, Rounds
from llmcad_actors.core.stats import Stats
from llmcad_actors.core.tree import TokenTree
from llmcad_actors.core.worth import ENOUGH_ROUNDS
from llmcad_actors.errors import DeadlineError
from llmcad_actors.loop import most_probable_path, serve
from llmcad_actors.messages import DraftEnded, DraftOrder, Event, Failed, Finished, Provisional, Tokens
from tests.fakes import (
    Choose,
    FunctionDrafter,
    FunctionVerifier,
    Script,
    Scripted,
    TickingClock,
    chain,
    decode,
    perfect,
    random_trees,
    silent,
)

VOCAB = 6
PROMPT = (3, 1, 4)
DRAFTS: dict[str, Callable[[Choose], FunctionDrafter | None]] = {
    "none": lambda choose: None,
    "silent": lambda choose: FunctionDrafter(silent),
    "perfect": lambda choose: FunctionDrafter(perfect(choose, 4), slices=3),
    "random": lambda choose: FunctionDrafter(random_trees(1, VOCAB), slices=100),
    "half right": lambda choose: FunctionDrafter(half_right(choose), slices=1),
}


def target(seed: int) -> Choose:
    """A target: the token after some tokens is a fixed, scattered function of them."""
    return lambda tokens: hash((seed, tokens)) % VOCAB


def half_right(choose: Choose) -> Callable[[tuple[int, ...]], TokenTree]:
    """Two tokens of the target's, then others."""

    def propose(tokens: tuple[int, ...]) -> TokenTree:
        right = tuple(perfect(choose, 3)(tokens).tokens.tolist())
        return chain((*right[:2], (right[2] + 1) % VOCAB, 0))

    return propose


def plain(choose: Choose, count: int, stop: tuple[int, ...] = (), prompt: tuple[int, ...] = PROMPT) -> tuple[int, ...]:
    tokens = prompt
    while len(tokens) < len(prompt) + count and tokens[-1] not in (stop if len(tokens) > len(prompt) else ()):
        tokens += (choose(tokens),)
    return tokens[len(prompt) :]


def run(request: Request, verifier: FunctionVerifier, drafter: FunctionDrafter | None) -> list[Event]:
    events: list[Event] = []
    asyncio.run(task(request, verifier, drafter, events))
    return events


async def task(
    request: Request, verifier: FunctionVerifier, drafter: FunctionDrafter | None, events: list[Event]
) -> Rounds:
    learnt = Rounds(AdaptiveConfidence(), CostModel())
    return await decode(request, drafter, verifier, learnt, TickingClock(), events.append)


def tokens_in(events: list[Event]) -> tuple[int, ...]:
    return tuple(token for event in events if isinstance(event, Tokens) for token in event.ids)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 1000),
    kind=st.sampled_from(list(DRAFTS)),
    count=st.integers(1, 30),
    turns=st.integers(0, 4),
    provisional=st.booleans(),
    stop=st.sets(st.integers(0, VOCAB - 1), max_size=2).map(tuple),
)
def test_the_output_is_the_targets_own_whatever_the_draft(
    seed: int, kind: str, count: int, turns: int, provisional: bool, stop: tuple[int, ...]
) -> None:
    choose, verifier = target(seed), FunctionVerifier(target(seed), turns=turns)
    events = run(Request(PROMPT, count, stop, provisional=provisional), verifier, DRAFTS[kind](choose))
    expected = plain(choose, count, stop)
    assert tokens_in(events) == expected
    (end,) = (event for event in events if isinstance(event, Finished))
    assert end is events[-1]
    assert end.reason == ("stop" if expected[-1] in stop else "length")


def test_what_was_learnt_is_handed_on() -> None:
    verifier = FunctionVerifier(target(2))
    request = Request(PROMPT, 20, ())
    learnt = asyncio.run(task(request, verifier, FunctionDrafter(half_right(target(2))), []))
    assert learnt.policy != AdaptiveConfidence()
    assert learnt.costs.num_passes == len(verifier.trees)


class CountingDrafter(FunctionDrafter):
    """Keeps the costs that it was told."""

    def __init__(self, propose: Callable[[tuple[int, ...]], TokenTree]) -> None:
        super().__init__(propose)
        self.told: list[Costs] = []

    async def grow(self, order: DraftOrder) -> Drafting:
        self.told.append(order.costs)
        return await super().grow(order)


def test_the_rows_of_a_prompt_count_in_its_first_pass_only() -> None:
    drafter = CountingDrafter(half_right(target(2)))
    run(Request((*PROMPT, 1, 2, 3), 20, ()), FunctionVerifier(target(2), held=2), drafter)
    assert [costs.pending_rows for costs in drafter.told[:3]] == [len(PROMPT) + 3 - 1 - 2, 0, 0]


@pytest.mark.parametrize("provisional", [False, True])
def test_the_policy_is_told_whether_the_draft_goes_on_during_the_pass(provisional: bool) -> None:
    drafter = CountingDrafter(half_right(target(2)))
    run(Request(PROMPT, 20, (), provisional=provisional), FunctionVerifier(target(2)), drafter)
    assert {costs.drafts_ahead for costs in drafter.told} == {provisional}


@pytest.mark.parametrize("kind", DRAFTS)
@pytest.mark.parametrize("provisional", [False, True])
def test_statistics_count_what_happened(kind: str, provisional: bool) -> None:
    choose, verifier = target(2), FunctionVerifier(target(2), turns=2)
    events = run(Request(PROMPT, 20, (), provisional=provisional), verifier, DRAFTS[kind](choose))
    stats = [event.stats for event in events if isinstance(event, Tokens)]
    last = events[-1]
    assert isinstance(last, Finished)
    assert last.stats == stats[-1]
    passes = len(verifier.trees)
    assert last.stats.target_passes == passes
    assert last.stats.new_tokens == 20
    assert last.stats.tokens_per_pass == 20 / passes
    assert last.stats.verified_nodes == sum(len(tree) for tree in verifier.trees)
    assert last.stats.compute_seconds == 25.0 * passes
    assert last.stats.stall_seconds == 75.0 * passes
    assert 20 <= last.stats.accepted_tokens + passes < 20 + 5
    assert 0 < last.stats.time_to_first_token_s < last.stats.seconds
    assert [s.target_passes for s in stats] == list(range(1, passes + 1))
    grown = 0 if kind == "none" else sum(len(tree) for tree in verifier.trees)
    assert last.stats.drafted_tokens >= grown
    if kind == "none" or not provisional:
        assert last.stats.drafted_tokens == grown
        assert last.stats.provisional_hits + last.stats.provisional_misses == 0
    elif kind != "silent":
        assert last.stats.provisional_hits == passes - 1  # the first round has nothing before it


def test_a_draft_that_holds_up_the_verdict_pauses_drafting_ahead() -> None:
    """Each look at the clock takes a second: a verdict that waits for a slice waits one, half of this pass."""
    verifier = FunctionVerifier(target(2), turns=2, seconds=2.0)
    events = run(Request(PROMPT, 20, ()), verifier, DRAFTS["random"](target(2)))
    counts = [event.stats.draft_steps for event in events if isinstance(event, Tokens)]
    steps = [after - before for before, after in itertools.pairwise([0, *counts])]
    assert steps[0] > 1  # it drafted ahead, and was late
    assert steps[1:3] == [1, 1]  # two passes without
    assert steps[3] > 1


def test_a_slice_that_would_outlast_the_pass_is_not_begun() -> None:
    """Each look takes a second, so a slice does; a pass takes twelve, and the first has none before it to judge by."""
    drafter = FunctionDrafter(silent, slices=10**6)
    events = run(Request(PROMPT, 3, ()), FunctionVerifier(target(1), turns=50, seconds=12.0), drafter)
    counts = [event.stats.draft_steps for event in events if isinstance(event, Tokens)]
    ahead = [after - before - 1 for before, after in itertools.pairwise([0, *counts])]
    assert ahead[0] == LEAST_STEPS
    assert ahead[1:] == [5, 5]  # begun after 1, 3, 5, 7 and 9 seconds


def test_a_perfect_draft_saves_the_passes_it_can() -> None:
    verifier = FunctionVerifier(target(1))
    run(Request(PROMPT, 20, ()), verifier, FunctionDrafter(perfect(target(1), 4)))
    assert len(verifier.trees) == 4


def test_a_long_pass_does_not_make_the_draft_work_through_it() -> None:
    drafter = FunctionDrafter(silent, slices=10**6)
    events = run(Request(PROMPT, 1, ()), FunctionVerifier(target(1), turns=500), drafter)
    assert isinstance(events[-1], Finished)
    assert events[-1].stats.drafted_tokens == 2 * LEAST_STEPS


def test_the_draft_grows_ahead_only_while_a_pass_runs_and_only_as_long_as_it_can() -> None:
    for turns, slices, expected in ((0, 100, 1), (3, 100, 3), (50, 2, 2)):
        drafter = FunctionDrafter(silent, slices=slices)
        events = run(Request(PROMPT, 1, ()), FunctionVerifier(target(1), turns=turns), drafter)
        assert isinstance(events[-1], Finished)
        assert events[-1].stats.drafted_tokens == pytest.approx(2 * expected, abs=2)
        assert events[-1].stats.drafted_tokens <= 2 * slices


def test_each_pass_is_announced_by_the_drafts_best_guess() -> None:
    guess = TokenTree.build([5, 2, 3, 1], [-1, -1, 1, 1], [-2.0, -0.1, -3.0, -0.2])
    assert most_probable_path(guess) == (2, 1)
    events = run(Request(PROMPT, 3, ()), FunctionVerifier(target(1)), FunctionDrafter(lambda tokens: guess))
    assert events[0] == Provisional((2, 1))
    kinds = [type(event) for event in events]
    assert kinds == [Provisional, Tokens] * (len(kinds) // 2) + [Finished]


def test_tokens_beyond_the_length_are_cut_and_a_stop_among_them_does_not_count() -> None:
    counting: Choose = lambda tokens: len(tokens)  # noqa: E731
    drafter = FunctionDrafter(perfect(counting, 5))
    events = run(Request(PROMPT, 3, (7,)), FunctionVerifier(counting), drafter)
    assert tokens_in(events) == (3, 4, 5)
    assert isinstance(events[-1], Finished)
    assert events[-1].reason == "length"


def test_a_cancelled_loop_ends_its_pass() -> None:
    async def cancelled(drafter: FunctionDrafter | None) -> int:
        verifier, events = FunctionVerifier(target(1), turns=10**9), list[Event]()
        running = asyncio.create_task(task(Request(PROMPT, 9, ()), verifier, drafter, events))
        while not verifier.num_running:
            await asyncio.sleep(0)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        await asyncio.sleep(0)
        return verifier.num_running

    for drafter in (None, FunctionDrafter(silent), FunctionDrafter(silent, slices=10**9)):
        assert asyncio.run(cancelled(drafter)) == 0


class WholeClock:
    """Time that passes only where something takes it."""

    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        return self.time


class TimedVerifier(FunctionVerifier):
    """A pass takes a second, one over a tree longer."""

    def __init__(self, choose: Choose, clock: WholeClock, *, tree_s: float = 0.5) -> None:
        super().__init__(choose)
        self._clock, self._tree_s = clock, tree_s

    async def verify(self, checks: Sequence[Check]) -> PassReport:
        report = await super().verify(checks)
        has_tree = any(len(check.tree) for check in checks)
        took = 1.0 + (self._tree_s if has_tree else 0.0)
        self._clock.time += took
        rows = 16 if has_tree else 1
        return replace(report, stats=PassStats(took, stall_s=0.0, compute_s=took, rows=rows))


class TimedDrafter(FunctionDrafter):
    """Drafting a tree takes time, and reading text that was not seen too."""

    def __init__(self, propose: Callable[[tuple[int, ...]], TokenTree], clock: WholeClock, seconds: float) -> None:
        super().__init__(propose)
        self._clock, self._tree_seconds = clock, seconds
        self.calls: list[int] = []  # verdicts that came with each

    async def grow(self, order: DraftOrder) -> Drafting:
        self.calls.append(sum(map(len, order.verdicts.values())))
        self._clock.time += self._tree_seconds
        return replace(await super().grow(order), seconds=self._tree_seconds)


def timed(
    propose: Callable[[tuple[int, ...]], TokenTree], draft_s: float, count: int, learnt: Rounds | None = None
) -> tuple[float, Stats, Rounds, list[int]]:
    """Seconds of a request by the default policy, its statistics, what it learnt, and the calls of its drafter."""
    clock, events = WholeClock(), list[Event]()
    drafter, verifier = TimedDrafter(propose, clock, draft_s), TimedVerifier(target(3), clock)
    known = CostModel(draft_step_s=draft_s, mean_compute_s=1.5, mean_rows=16.0, read_s=0.0, plain_compute_s=1.0)
    learnt = learnt or Rounds(MarginalThroughput(), known)
    after = asyncio.run(decode(Request(PROMPT, count, ()), drafter, verifier, learnt, clock, events.append))
    assert tokens_in(events) == plain(target(3), count)
    assert isinstance(events[-1], Finished)
    return clock.time, events[-1].stats, after, drafter.calls


def test_a_draft_that_is_always_wrong_is_soon_left_out() -> None:
    """Each drafted round takes 1.7 s where a plain pass takes 1."""
    wrong = lambda tokens: chain([(target(3)(tokens) + 1) % VOCAB])  # noqa: E731
    seconds, stats, learnt, calls = timed(wrong, 0.2, 100)
    assert seconds < 105
    assert stats.undrafted_passes > 90
    assert len(calls) == 100 - stats.undrafted_passes
    seconds, stats, _, _ = timed(wrong, 0.2, 100, learnt)  # the next request knows it
    assert seconds < 103


def test_a_draft_that_is_left_out_hears_later_of_every_pass() -> None:
    wrong = lambda tokens: chain([(target(3)(tokens) + 1) % VOCAB])  # noqa: E731
    _, stats, _, calls = timed(wrong, 0.2, 200)
    assert max(calls) > 10  # the passes of a pause, at once
    assert sum(calls) <= stats.target_passes - 1


def test_a_useless_draft_is_ended_where_its_memory_would_help_and_never_called_again() -> None:
    wrong = lambda tokens: chain([(target(3)(tokens) + 1) % VOCAB])  # noqa: E731
    known = CostModel(draft_step_s=0.01, read_s=1.0, mean_compute_s=0.5, draft_memory_share=0.13)
    for policy, is_ended in ((MarginalThroughput(), True), (AdaptiveConfidence(), False)):
        clock, events = WholeClock(), list[Event]()
        drafter, verifier = TimedDrafter(wrong, clock, 0.01), TimedVerifier(target(3), clock, tree_s=0.0)
        asyncio.run(decode(Request(PROMPT, 100, ()), drafter, verifier, Rounds(policy, known), clock, events.append))
        assert tokens_in(events) == plain(target(3), 100)
        assert [event for event in events if isinstance(event, DraftEnded)] == [DraftEnded()] * is_ended
        assert len(drafter.calls) == (ENOUGH_ROUNDS if is_ended else 100)


def test_a_draft_as_dear_as_the_target_is_never_called() -> None:
    seconds, stats, _, calls = timed(perfect(target(3), 4), 1.0, 50)
    assert calls == [] and stats.draft_steps == 0
    assert seconds == 50 and stats.undrafted_passes == stats.target_passes == 50


def test_a_draft_that_pays_is_left_out_for_single_passes_alone() -> None:
    seconds, stats, _, calls = timed(perfect(target(3), 4), 0.2, 200)
    assert stats.undrafted_passes <= 0.1 * stats.target_passes
    assert max(calls) <= 2
    assert seconds < 0.4 * 200


@pytest.mark.parametrize("kind", ["perfect", "random", "half right"])
@given(st.lists(st.booleans(), min_size=40, max_size=40))
def test_whenever_the_draft_is_left_out_the_output_is_the_targets(kind: str, drafts: list[bool]) -> None:
    choose, drafter, events = target(5), DRAFTS[kind](target(5)), list[Event]()
    learnt = Rounds(Scripted(drafts=tuple(drafts)), CostModel())
    verifier = FunctionVerifier(choose, turns=1)
    asyncio.run(decode(Request(PROMPT, 30, ()), drafter, verifier, learnt, TickingClock(), events.append))
    assert tokens_in(events) == plain(choose, 30)
    assert isinstance(events[-1], Finished)
    passes = len(verifier.trees)
    assert events[-1].stats.undrafted_passes == passes - sum(drafts[:passes])
    assert all(len(tree) == 0 for tree, drafted in zip(verifier.trees, drafts, strict=False) if not drafted)


class Broken(FunctionDrafter):
    """Cannot draft ahead."""

    async def extend(self) -> Grown:
        raise DeadlineError("drafting ahead did not come within 1 s")


class BrokenVerifier(FunctionVerifier):
    async def verify(self, checks: Sequence[Check]) -> PassReport:
        await super().verify(checks)
        raise DeadlineError("a target pass did not come within 1 s")


def test_what_breaks_in_a_port_reaches_the_caller_and_ends_the_pass() -> None:
    verifier = FunctionVerifier(target(1), turns=10**9)
    with pytest.raises(DeadlineError, match="drafting ahead"):
        run(Request(PROMPT, 9, ()), verifier, Broken(silent))
    assert verifier.num_running == 0
    with pytest.raises(DeadlineError, match="a target pass"):
        run(Request(PROMPT, 9, ()), BrokenVerifier(target(1), turns=3), FunctionDrafter(silent, slices=100))


@settings(max_examples=60)
@given(data=st.data())
def test_requests_that_share_passes_each_get_their_own_text_whoever_comes_and_goes(data: st.DataObject) -> None:
    choose = target(data.draw(st.integers(0, 1000), "seed"))
    news, requests, cancelled = list[News](), dict[int, Request](), set[int]()
    for _ in range(data.draw(st.integers(1, 12), "rounds")):
        arrivals = list[Arrival]()
        for _ in range(data.draw(st.integers(0, 2))):
            number = len(requests) + 1
            prompt = tuple(data.draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=600)))
            stop = tuple(data.draw(st.sets(st.integers(0, VOCAB - 1), max_size=1)))
            speculate = data.draw(st.booleans())
            requests[number] = Request(prompt, data.draw(st.integers(1, 12)), stop, speculate=speculate)
            arrivals.append(Arrival(number, requests[number], 0.0))
        gone = frozenset(data.draw(st.sets(st.sampled_from(sorted(requests)), max_size=1)) if requests else ())
        cancelled |= gone
        news.append(News(tuple(arrivals), gone))
    verifier = FunctionVerifier(choose, turns=data.draw(st.integers(0, 3)))
    drafter = DRAFTS[data.draw(st.sampled_from(list(DRAFTS)), "draft")](choose)
    events: dict[int, list[Event]] = {number: [] for number in requests}
    rounds = Rounds(AdaptiveConfidence(), CostModel(), Limits(data.draw(st.integers(1, 4)), 1500))
    after = asyncio.run(
        serve(
            Script(*news), drafter, verifier, rounds, TickingClock(), lambda number, event: events[number].append(event)
        )
    )
    assert after.is_idle and not verifier.texts  # all rows have been given back
    for number, request in requests.items():
        expected = plain(choose, request.max_new_tokens, request.stop_tokens, request.prompt)
        found = tokens_in(events[number])
        if number in cancelled:
            assert found == expected[: len(found)]
            continue
        assert found == expected
        assert isinstance(events[number][-1], Finished)
        assert sum(isinstance(event, Finished) for event in events[number]) == 1
    assert all(len(checks) <= rounds.limits.max_requests for checks in verifier.passes)


def test_what_breaks_a_port_breaks_those_that_run_and_those_that_wait_go_on() -> None:
    class BreaksOnce(FunctionVerifier):
        async def verify(self, checks: Sequence[Check]) -> PassReport:
            if len(self.passes) == 2:
                self.passes.append([])
                raise DeadlineError("a target pass did not come within 1 s")
            return await super().verify(checks)

    verifier, events = BreaksOnce(target(1)), list[tuple[int, Event]]()
    news = News(tuple(Arrival(number, Request(PROMPT, 5, ()), 0.0) for number in (1, 2, 3)))
    rounds = Rounds(AdaptiveConfidence(), CostModel(), Limits(2))
    drafter = FunctionDrafter(silent)
    asyncio.run(serve(Script(news), drafter, verifier, rounds, TickingClock(), lambda *event: events.append(event)))
    failed = [number for number, event in events if isinstance(event, Failed)]
    assert failed == [1, 2]
    assert tokens_in([event for number, event in events if number == 3]) == plain(target(1), 5)
    assert not verifier.texts


def test_who_waits_for_too_long_is_told() -> None:
    clock, events = WholeClock(), list[tuple[int, Event]]()
    news = News(tuple(Arrival(number, Request(PROMPT, 5, (), queue_s=3.5), 0.0) for number in (1, 2)))
    rounds = Rounds(AdaptiveConfidence(), CostModel(), Limits(1))
    verifier = TimedVerifier(target(1), clock)
    asyncio.run(serve(Script(news), None, verifier, rounds, clock, lambda *event: events.append(event)))
    assert tokens_in([event for number, event in events if number == 1]) == plain(target(1), 5)
    (told,) = (event for number, event in events if number == 2)
    assert isinstance(told, Failed) and told.kind == "DeadlineError" and "waited for longer" in told.message
