"""Who joins a pass and when, as values: room, order, deadlines, long prompts."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from llmcad_actors.core.costs import CostModel
from llmcad_actors.core.fallback import AdaptiveConfidence
from llmcad_actors.core.request import Request
from llmcad_actors.core.round import Drafting, Grown, PassReport, PassStats, Submission, Verdict
from llmcad_actors.core.rounds import LEAST_PROMPT_ROWS, NO_DRAFTING, NOTHING_AHEAD, Arrival, Limits, News, Rounds
from llmcad_actors.core.tree import TokenTree

STATS = PassStats(1.0, 0.2, 0.8, 9)


def rounds(max_requests: int = 4, rows: int = 1000) -> Rounds:
    return Rounds(AdaptiveConfidence(), CostModel(), Limits(max_requests, rows))


def request(prompt: int = 5, count: int = 10, first: int = 0, **more: float) -> Request:
    return Request(tuple(range(first, first + prompt)), count, (), **more)  # type: ignore[arg-type]


def arrivals(*requests: Request, at: float = 0.0, first: int = 1) -> News:
    return News(tuple(Arrival(first + i, each, at) for i, each in enumerate(requests)))


def passed(state: Rounds, drafting: Drafting = NO_DRAFTING, ahead: Grown = NOTHING_AHEAD) -> Rounds:
    """A pass in which the target says 7 to all whose prompt is run to its end."""
    checks = state.checks()
    known = state.costs_of(checks)
    spoken = [each.number for each in state._choosing(checks)]
    report = PassReport(STATS, {number: Verdict((), 7, False) for number in spoken})
    return state.after(checks, known, drafting, report, ahead, seconds=1.0, now=1.0)[0]


def numbers(state: Rounds) -> list[int]:
    return [each.number for each in state.running]


def test_requests_join_in_their_order_as_long_as_there_is_room() -> None:
    news = arrivals(request(), request(prompt=900), request(), request())
    state, change = rounds().schedule(news, 0.0)
    assert (numbers(state), list(change.joined)) == ([1, 2, 3, 4], [1, 2, 3, 4])
    state, _ = rounds(rows=930).schedule(news, 0.0)
    assert numbers(state) == [1, 2]
    assert [each.number for each in state.waiting] == [3, 4]


def test_a_request_that_is_too_large_does_not_wait_for_ever() -> None:
    """What plans leave no room for is refused before; should it come, the target says so."""
    state, _ = rounds(rows=50).schedule(arrivals(request(), request(prompt=100), request()), 0.0)
    assert numbers(state) == [1]
    state, _ = state.schedule(News((), frozenset({1})), 0.0)
    assert numbers(state) == [2]


def test_no_more_run_than_may_and_one_that_ends_makes_room_before_the_next_pass() -> None:
    state, _ = rounds(max_requests=2).schedule(arrivals(request(), request(count=1), request()), 0.0)
    assert numbers(state) == [1, 2]
    state = passed(state.begun({1: 0, 2: 0}))
    assert (numbers(state), state.ended) == ([1], (2,))
    state, change = state.schedule(News(), 1.0)
    assert (numbers(state), change.ended, list(change.joined)) == ([1, 3], (2,), [3])
    assert not state.ended


def test_who_waits_or_runs_can_be_cancelled_and_nobody_else_is_disturbed() -> None:
    state, _ = rounds(max_requests=2).schedule(arrivals(request(), request(), request(), request()), 0.0)
    state, change = state.schedule(News((), frozenset({1, 3, 99})), 0.0)
    assert (numbers(state), change.ended, list(change.joined)) == ([2, 4], (1,), [4])


def test_who_waits_for_too_long_is_told_and_who_runs_is_not() -> None:
    news = arrivals(request(queue_s=5.0), request(queue_s=5.0), request())
    state, change = rounds(max_requests=1).schedule(news, 0.0)
    assert change.late == ()
    state, change = state.schedule(News(), 5.5)
    assert (change.late, numbers(state)) == ((2,), [1])
    assert [each.number for each in state.waiting] == [3]


def test_a_request_alone_runs_its_whole_prompt_at_once() -> None:
    state, _ = rounds(rows=10**6).schedule(arrivals(request(prompt=5000)), 0.0)
    state = state.begun({1: 100})
    assert state.running[0].pending == 4899
    assert state.checks()[1].most_prompt is None
    assert passed(state).running[0].pending == 0


def test_beside_others_a_long_prompt_comes_in_parts_and_all_get_a_share() -> None:
    state, _ = rounds(rows=10**6).schedule(
        arrivals(request(prompt=2000), request(prompt=2000, first=1), request()), 0.0
    )
    state = state.begun({1: 0, 2: 0, 3: 4})
    checks = state.checks()
    share = checks[1].most_prompt
    assert share == checks[2].most_prompt and share is not None
    known = state.costs_of(checks)
    assert known.pending_rows == 2 * share and known.num_requests == 1
    assert 2 * share >= LEAST_PROMPT_ROWS - 1
    assert [each.number for each in state._choosing(checks)] == [3]
    state = passed(state)
    assert [each.pending for each in state.running] == [1999 - share, 1999 - share, 0]
    assert [each.stats.new_tokens for each in state.running] == [0, 0, 1]
    for _ in range(60):
        state = passed(state)
    assert all(each.stats.new_tokens > 0 for each in state.running if each.number < 3)


def test_the_draft_hears_of_who_joins_and_leaves_once_and_of_every_verdict() -> None:
    state, _ = rounds().schedule(arrivals(request(), request(count=2)), 0.0)
    state = state.begun({1: 0, 2: 0})
    assert [each.number for each in state.drafted(state.checks(), state.costs_of(state.checks()))] == [1, 2]
    state = passed(state)  # left out
    assert [each.verdicts for each in state.running] == [(Verdict((), 7, False),)] * 2
    assert [each.unseen for each in state.running] == [5, 5]
    grown = Drafting({1: Submission(TokenTree.empty()), 2: Submission(TokenTree.empty())})
    state = passed(state, grown)
    assert state.ended_for_draft == (2,)
    assert [(each.is_known, len(each.verdicts), each.unseen) for each in state.running] == [(True, 1, 1)]
    state = passed(state, Drafting({1: Submission(TokenTree.empty())}))
    assert state.ended_for_draft == ()


def test_who_asks_the_same_waits_a_pass_for_the_rows_of_the_prompt() -> None:
    state, _ = rounds().schedule(arrivals(request(prompt=100), request(prompt=100), request(prompt=100)), 0.0)
    assert numbers(state) == [1]
    state, change = passed(state.begun({1: 0})).schedule(News(), 0.0)
    assert (numbers(state), list(change.joined)) == ([1, 2, 3], [2, 3])


def test_a_request_that_is_refused_ends_alone() -> None:
    state, _ = rounds().schedule(arrivals(request(), request()), 0.0)
    state = state.begun({1: 4, 2: 4})
    report = PassReport(STATS, {1: Verdict((), 7, False)}, {2: "no token is left"})
    checks = state.checks()
    state, steps = state.after(checks, state.costs_of(checks), NO_DRAFTING, report, NOTHING_AHEAD, seconds=1, now=1)
    assert (numbers(state), state.ended, [step.running.number for step in steps]) == ([1], (2,), [1])


def test_what_a_round_brings_is_judged_by_the_request() -> None:
    """Two that get three tokens each are as good as one that gets three."""
    tree = TokenTree.build([7, 7], [-1, 0], [-0.1, -0.1])
    learnt = []
    for count in (1, 2):
        state, _ = rounds().schedule(arrivals(*[request()] * count), 0.0)
        state = state.begun(dict.fromkeys(range(1, count + 1), 4))
        state = replace(state, policy=_Listening())
        grown = Drafting({n: Submission(tree) for n in range(1, count + 1)}, steps=2, drafted=4, seconds=0.5)
        report = PassReport(STATS, {n: Verdict((0, 1), 7, False) for n in range(1, count + 1)})
        checks = state.checks()
        state, _ = state.after(checks, state.costs_of(checks), grown, report, NOTHING_AHEAD, seconds=2.0, now=2.0)
        assert isinstance(state.policy, _Listening)
        learnt.append(state.policy.heard)
        assert [each.stats.drafted_tokens for each in state.running] == [4 // count] * count
    assert learnt == [[(True, 3.0)], [(True, 3.0)]]


class _Listening(AdaptiveConfidence):
    """Keeps what it hears of rounds."""

    heard: list[tuple[bool, float]]

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "heard", [])

    def after(self, outcome: object) -> "_Listening":
        return self

    def after_round(self, done: object) -> "_Listening":
        self.heard.append((done.is_drafted, done.tokens))  # type: ignore[attr-defined]
        return self


@given(data=st.data())
def test_whatever_comes_and_goes_rows_and_places_are_never_given_out_twice(data: st.DataObject) -> None:
    state, number, clock = rounds(max_requests=3, rows=120), 0, 0.0
    known, done = set[int](), set[int]()
    for _ in range(data.draw(st.integers(1, 30))):
        clock += 1
        new = []
        for _ in range(data.draw(st.integers(0, 3))):
            number += 1
            new.append(Arrival(number, request(data.draw(st.integers(1, 60)), data.draw(st.integers(1, 30))), clock))
            known.add(number)
        gone = frozenset(data.draw(st.sets(st.sampled_from(sorted(known)), max_size=2)) if known else ())
        before = numbers(state)
        state, change = state.schedule(News(tuple(new), gone), clock)
        done |= gone
        assert not set(change.joined) & set(before)
        assert len(state.running) <= 3
        assert sum(each.request.num_rows for each in state.running) <= 120
        assert set(numbers(state)) == (set(before) - set(change.ended)) | set(change.joined)
        if state.running:
            state = passed(state.begun(dict.fromkeys(change.joined, 0)))
            done |= set(state.ended)
    for _ in range(2000):
        if state.is_idle:
            break
        state, change = state.schedule(News(), clock)
        if state.running:
            state = passed(state.begun(dict.fromkeys(change.joined, 0)))
            done |= set(state.ended)
    assert state.is_idle and done == known
