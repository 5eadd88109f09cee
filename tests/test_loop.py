"""The decode loop over fakes: every token is the target's, whatever the draft does and whenever it does it."""

import asyncio
import itertools
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcad_actors.core.costs import CostModel, Costs
from llmcad_actors.core.fallback import AdaptiveConfidence, Policy
from llmcad_actors.core.provisional import LEAST_STEPS
from llmcad_actors.core.tree import TokenTree
from llmcad_actors.errors import DeadlineError
from llmcad_actors.loop import Learnt, decode, most_probable_path
from llmcad_actors.messages import Event, Finished, Grown, Provisional, Request, Submission, Tokens, Verdict
from tests.fakes import Choose, FunctionDrafter, FunctionVerifier, TickingClock, chain, perfect, random_trees, silent

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


def plain(choose: Choose, count: int, stop: tuple[int, ...] = ()) -> tuple[int, ...]:
    tokens: tuple[int, ...] = PROMPT
    while len(tokens) < len(PROMPT) + count and tokens[-1] not in (stop if len(tokens) > len(PROMPT) else ()):
        tokens += (choose(tokens),)
    return tokens[len(PROMPT) :]


def run(request: Request, verifier: FunctionVerifier, drafter: FunctionDrafter | None) -> list[Event]:
    events: list[Event] = []
    asyncio.run(task(request, verifier, drafter, events))
    return events


async def task(
    request: Request, verifier: FunctionVerifier, drafter: FunctionDrafter | None, events: list[Event]
) -> Learnt:
    learnt = Learnt(AdaptiveConfidence(), CostModel())
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


class HoldingVerifier(FunctionVerifier):
    """Still holds two tokens of the prompt from the last text."""

    async def begin(self, prompt: tuple[int, ...], stop_tokens: tuple[int, ...], max_new_tokens: int) -> int:
        await super().begin(prompt, stop_tokens, max_new_tokens)
        return 2


class CountingDrafter(FunctionDrafter):
    """Keeps the costs that it was told."""

    def __init__(self, propose: Callable[[tuple[int, ...]], TokenTree]) -> None:
        super().__init__(propose)
        self.told: list[Costs] = []

    async def grow(self, verdict: Verdict | None, policy: Policy, costs: Costs) -> Submission:
        self.told.append(costs)
        return await super().grow(verdict, policy, costs)


def test_the_rows_of_a_prompt_count_in_its_first_pass_only() -> None:
    drafter = CountingDrafter(half_right(target(2)))
    run(Request((*PROMPT, 1, 2, 3), 20, ()), HoldingVerifier(target(2)), drafter)
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


class Broken(FunctionDrafter):
    """Cannot draft ahead."""

    async def extend(self) -> Grown:
        raise DeadlineError("drafting ahead did not come within 1 s")


class BrokenVerifier(FunctionVerifier):
    async def verify(self, tree: TokenTree) -> Verdict:
        await super().verify(tree)
        raise DeadlineError("a target pass did not come within 1 s")


def test_what_breaks_in_a_port_reaches_the_caller_and_ends_the_pass() -> None:
    verifier = FunctionVerifier(target(1), turns=10**9)
    with pytest.raises(DeadlineError, match="drafting ahead"):
        run(Request(PROMPT, 9, ()), verifier, Broken(silent))
    assert verifier.num_running == 0
    with pytest.raises(DeadlineError, match="a target pass"):
        run(Request(PROMPT, 9, ()), BrokenVerifier(target(1), turns=3), FunctionDrafter(silent, slices=100))
