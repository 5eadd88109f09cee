"""Drafting that does not pay costs little, whatever it costs; drafting that pays is not paused by bad luck."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmcad_actors.core.costs import Costs
from llmcad_actors.core.worth import (
    ENOUGH_ROUNDS,
    FIRST_CREDIT,
    LEAST_MEMORY_SHARE,
    LEAST_SHARE,
    MOST_CREDIT,
    MOST_LOSS,
    ROUNDS_PER_RIGHT,
    Round,
    Worth,
    can_pay,
)

PLAIN_S = 0.25
COSTS = Costs(0.005, pass_read_s=0.0, pass_base_s=PLAIN_S, pass_node_s=0.01)
MANY = 10**6


def play(worth: Worth, rounds: list[Round], costs: Costs = COSTS, plain_s: float = PLAIN_S) -> tuple[Worth, list[bool]]:
    """As the loop does: `rounds` are what drafting would bring, one after the other."""
    drafted = []
    for done in rounds:
        drafted.append(worth.should_draft(costs, unseen=1, left=MANY))
        worth = worth.after(done if drafted[-1] else Round(False, 1, plain_s))
    return worth, drafted


def seconds_of(rounds: list[Round], drafted: list[bool], plain_s: float = PLAIN_S) -> tuple[float, float]:
    """Time and tokens of what was played."""
    done = [each if was else Round(False, 1, plain_s) for each, was in zip(rounds, drafted, strict=True)]
    return sum(each.seconds for each in done), sum(each.tokens for each in done)


def is_paused(drafted: list[bool]) -> bool:
    """Single passes without the draft are for timing them."""
    return any(not one and not other for one, other in itertools.pairwise(drafted))


@given(st.floats(1.02, 1 + MOST_LOSS), st.integers(30, 400))
def test_a_draft_that_is_never_right_costs_two_rounds_the_credit_and_a_small_share(slow: float, count: int) -> None:
    """A round before a plain pass was timed, and one that the credit does not wholly cover; the first share is more."""
    rounds = [Round(True, 1, slow * PLAIN_S)] * count
    seconds, tokens = seconds_of(rounds, play(Worth(), rounds)[1])
    lost = seconds / PLAIN_S - tokens
    assert lost <= FIRST_CREDIT + 3 * (slow - 1) + LEAST_SHARE * count


def test_the_first_pause_is_shorter_than_those_after_it() -> None:
    drafted = play(Worth(), [Round(True, 1, 1.6 * PLAIN_S)] * 400)[1]
    trials = [i for i, was in enumerate(drafted) if was]
    pauses = [b - a - 1 for a, b in itertools.pairwise(trials) if b - a > 2]
    assert pauses[0] <= 30 < 50 < pauses[1]
    assert pauses[1:] == pytest.approx([60] * len(pauses[1:]), abs=3)


@pytest.mark.parametrize(("gain", "unlucky"), [(1.5, 0.05), (2.0, 0.01), (2.5, 0.0), (9.0, 0.0)])
def test_a_draft_that_pays_is_drafted_but_for_the_passes_that_are_timed(gain: float, unlucky: float) -> None:
    """Rounds of the same length bring a few tokens or none, by chance; on average `gain` times what plain passes do.

    Whose first rounds bring nothing is paused, the less often the more it gains.
    """
    drafted, length = [], 1.3
    for seed in range(300):
        tokens = 1 + np.random.default_rng(seed).poisson(gain * length - 1, 100)
        rounds = [Round(True, int(count), length * PLAIN_S) for count in tokens]
        drafted.append(sum(play(Worth(), rounds)[1]))
    assert np.mean(drafted) >= 90
    assert np.mean(np.array(drafted) < 75) <= unlucky


@pytest.mark.parametrize("tokens", [1, 6])
def test_an_engine_may_run_for_weeks(tokens: int) -> None:
    """Thousands of plain passes, and of drafted rounds, are counted."""
    drafted = play(Worth(), [Round(True, tokens, 1.3 * PLAIN_S)] * 20_000)[1]
    assert sum(drafted[-2000:]) == pytest.approx(2000 if tokens > 1 else 0, abs=100)


def test_a_few_unlucky_rounds_do_not_pause_a_draft_that_had_paid() -> None:
    good, bad = Round(True, 5, 2 * PLAIN_S), Round(True, 1, 1.3 * PLAIN_S)
    drafted = play(Worth(), [good] * 10 + [bad] * 6 + [good] * 10)[1]
    assert not is_paused(drafted)


def test_a_hiccup_of_the_machine_does_not_pause_a_draft_that_pays() -> None:
    good = Round(True, 4, 1.5 * PLAIN_S)
    drafted = play(Worth(), [good] * 10 + [Round(True, 1, 100 * PLAIN_S)] + [good] * 10)[1]
    assert not is_paused(drafted)


def test_a_draft_that_becomes_good_is_used_again() -> None:
    bad, good = Round(True, 1, 1.5 * PLAIN_S), Round(True, 6, 1.5 * PLAIN_S)
    worth = play(Worth(), [bad] * 100)[0]
    drafted = play(worth, [good] * 200)[1]
    assert sum(drafted[-50:]) >= 45


def test_what_is_known_carries_over_to_the_next_request() -> None:
    worth = play(Worth(), [Round(True, 1, 2 * PLAIN_S)] * 60)[0]
    assert not any(play(worth, [Round(True, 1, 2 * PLAIN_S)] * 5)[1])


STREAMED = replace(COSTS, draft_memory_share=0.13)


def test_a_draft_is_useless_once_many_rounds_have_brought_less_than_its_memory_would() -> None:
    never_right = Round(True, 1, 1.02 * PLAIN_S)
    worth = Worth()
    for _ in range(ENOUGH_ROUNDS - 1):
        worth = worth.after(never_right).after(Round(False, 1, PLAIN_S))  # what was not drafted shows nothing
        assert not worth.is_useless(STREAMED)
    worth = worth.after(never_right)
    assert worth.is_useless(STREAMED)
    assert not worth.is_useless(COSTS)
    assert not worth.is_useless(replace(COSTS, draft_memory_share=LEAST_MEMORY_SHARE / 2))


def test_a_guess_that_was_right_takes_more_rounds_to_outweigh_and_many_are_not_outweighed() -> None:
    never_right, worth = Round(True, 1, 1.02 * PLAIN_S), Worth().after(Round(True, 2, 1.02 * PLAIN_S))
    for _ in range(ENOUGH_ROUNDS + ROUNDS_PER_RIGHT - 2):
        worth = worth.after(never_right)
        assert not worth.is_useless(STREAMED)
    assert worth.after(never_right).is_useless(STREAMED)
    assert not worth.after(never_right).is_useless(replace(STREAMED, draft_memory_share=0.05))
    good = Worth(all_rounds=200, all_right=27)  # 0.135 a round
    assert not good.is_useless(STREAMED)
    assert replace(good, all_right=25).is_useless(STREAMED)


@pytest.mark.parametrize(("right", "mistaken"), [(0.3, 0.05), (0.5, 0.002), (0.02, 1.0)])
def test_a_draft_that_gains_more_than_its_memory_would_is_rarely_taken_for_useless(
    right: float, mistaken: float
) -> None:
    """Each round brings a guess more with probability `right`, 100 rounds; 1000 drafts."""
    found = 0
    for seed in range(1000):
        worth = Worth()
        for hit in np.random.default_rng(seed).random(100) < right:
            worth = worth.after(Round(True, 1 + int(hit), 1.02 * PLAIN_S))
            if worth.is_useless(STREAMED):
                found += 1
                break
    assert found / 1000 <= mistaken
    assert right > 0.1 or found > 980


def test_a_draft_that_is_never_right_is_tried_beyond_the_credit_where_its_memory_is_worth_more() -> None:
    rounds = [Round(True, 1, 1.3 * PLAIN_S)] * 60  # each loses 0.3 passes
    assert sum(play(Worth(), rounds, COSTS)[1]) < ENOUGH_ROUNDS
    worth = Worth()
    for count, done in enumerate(rounds):
        if worth.is_useless(STREAMED):
            break
        left = 100 - count
        worth = worth.after(done if worth.should_draft(STREAMED, unseen=1, left=left) else Round(False, 1, PLAIN_S))
    assert worth.is_useless(STREAMED)
    assert count <= ENOUGH_ROUNDS + 3
    short = replace(worth, all_rounds=4, credit=-1.0)
    assert short.should_draft(STREAMED, unseen=1, left=20)
    assert not short.should_draft(STREAMED, unseen=1, left=10)
    assert not short.should_draft(COSTS, unseen=1, left=100)
    assert not short.should_draft(replace(STREAMED, draft_step_s=PLAIN_S / 2), unseen=1000, left=100)  # to be read
    assert replace(short, all_right=1).should_draft(STREAMED, unseen=1, left=100)
    assert not replace(short, all_right=9).should_draft(STREAMED, unseen=1, left=100)


def test_by_costs_alone_a_draft_as_dear_as_the_target_is_never_tried() -> None:
    equal = replace(COSTS, draft_step_s=PLAIN_S)
    assert not can_pay(equal) and can_pay(COSTS)
    assert not any(play(Worth(), [Round(True, 9, PLAIN_S)] * 100, equal)[1])
    # streamed, a pass takes longer than a step, and a part of drafting is hidden behind reading
    assert can_pay(replace(equal, pass_read_s=4 * PLAIN_S))
    assert can_pay(replace(equal, pass_read_s=PLAIN_S, hidden_s=PLAIN_S))


def test_a_prompt_that_takes_the_draft_long_is_not_read_for_a_trial() -> None:
    dear = replace(COSTS, draft_step_s=PLAIN_S / 2)  # a row of a prompt then takes it 5 ms
    assert Worth().should_draft(dear, unseen=100, left=100)
    assert not Worth().should_draft(dear, unseen=1000, left=100)
    assert Worth().should_draft(dear, unseen=1000, left=1000)


def test_nor_where_what_is_left_cannot_make_up_for_it() -> None:
    dear = replace(COSTS, draft_step_s=PLAIN_S / 2)
    paying = play(Worth(), [Round(True, 2, 1.5 * PLAIN_S)] * 30, dear)[0]
    assert paying.should_draft(dear, unseen=1000, left=1000)
    assert not paying.should_draft(dear, unseen=1000, left=30)


def test_a_plain_pass_is_timed_before_long_unless_there_is_no_doubt() -> None:
    clear, doubtful = [Round(True, 5, PLAIN_S)] * 20, [Round(True, 2, PLAIN_S)] * 20
    assert all(play(Worth(), clear)[1])
    assert play(Worth(), doubtful)[1][:2] == [True, False]


def test_losses_are_charged_by_what_plain_passes_were_seen_to_take() -> None:
    """The model of costs may be wrong about them."""
    wrong = replace(COSTS, pass_base_s=2 * PLAIN_S)
    drafted = play(Worth(), [Round(True, 4, 5 * PLAIN_S)] * 100, wrong)[1]
    assert sum(drafted) < 10


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 40), st.floats(1e-4, 100)), max_size=60))
def test_the_account_stays_in_bounds(rounds: list[tuple[bool, int, float]]) -> None:
    worth = Worth()
    for is_drafted, tokens, seconds in rounds:
        before, worth = worth.credit, worth.after(Round(is_drafted, tokens, seconds))
        assert before - MOST_LOSS <= worth.credit <= MOST_CREDIT
        assert worth.share >= LEAST_SHARE


def test_catching_up_is_charged_and_is_no_sign_of_later_rounds() -> None:
    worth = Worth().after(Round(False, 1, PLAIN_S))
    caught_up = worth.after(Round(True, 3, 3 * PLAIN_S, catch_up_s=2 * PLAIN_S))
    assert caught_up.credit == pytest.approx(worth.credit)
    assert caught_up.should_draft(COSTS, 1, MANY)
    assert caught_up.seconds == pytest.approx(PLAIN_S)
