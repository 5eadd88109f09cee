"""Drafting ahead pauses where it holds up the verdict, or takes cores from a pass that needs them."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from llmcad_actors.core.costs import Costs
from llmcad_actors.core.provisional import (
    DEAR_STEP_SHARE,
    LEAST_STEPS,
    LONGEST_PAUSE,
    TOLERATED_SHARE,
    WORK_SHARE,
    Patience,
    allowance,
    is_worth_it,
)


def passes_until_it_drafts_again(patience: Patience) -> int:
    count = 0
    while patience.is_over:
        patience, count = patience.after(1.0, 0.0), count + 1
    return count


@given(st.floats(0.001, 1000), st.floats(0, TOLERATED_SHARE))
def test_a_draft_that_is_in_time_never_pauses(pass_s: float, share: float) -> None:
    assert not Patience().after(pass_s, late_s=share * pass_s).is_over


def costs(draft_step_s: float, read_s: float, **more: Any) -> Costs:
    return Costs(draft_step_s, pass_read_s=read_s, pass_base_s=0.6, pass_node_s=0.02, **{"drafts_ahead": True, **more})


def test_what_was_not_asked_for_is_not_done() -> None:
    assert not is_worth_it(costs(0.1, read_s=6.0, drafts_ahead=False), 20)


def test_drafting_that_reading_hides_between_passes_is_not_done_ahead() -> None:
    drafting = 0.01 * LEAST_STEPS
    assert not is_worth_it(costs(0.01, read_s=6.0, hidden_s=drafting), 20)
    assert not is_worth_it(costs(0.01, read_s=6.0, hidden_s=0.95 * drafting), 20)
    assert is_worth_it(costs(0.01, read_s=6.0, hidden_s=0.8 * drafting), 20)
    assert not is_worth_it(costs(0.01, read_s=6.0, hidden_s=drafting, drafted_s=drafting), 20)  # when it has been done
    # computing takes 1.0 s of 1.3: of 1.0 s of drafting, reading hides 0.3
    beside_computing = costs(0.05, read_s=1.3, hidden_s=1.2)
    assert is_worth_it(beside_computing, 20)


def test_there_is_room_beside_a_pass_that_waits_for_the_disk() -> None:
    assert is_worth_it(costs(0.005, read_s=1.3), 20)  # computing takes 1.0
    assert not is_worth_it(costs(0.005, read_s=1.2), 20)
    assert is_worth_it(costs(0.005, read_s=1.2), 10)


def test_beside_a_pass_bound_by_computing_only_a_dear_draft_goes_on() -> None:
    assert not is_worth_it(costs(0.9 * DEAR_STEP_SHARE, read_s=0.5), 20)
    assert is_worth_it(costs(1.1 * DEAR_STEP_SHARE, read_s=0.5), 20)


def test_a_prompts_pass_is_bound_by_computing() -> None:
    assert is_worth_it(costs(0.005, read_s=6.0), 20)
    assert not is_worth_it(costs(0.005, read_s=6.0, pending_rows=300), 20)


def test_a_pass_whose_halves_take_turns_leaves_the_time_of_reading() -> None:
    assert is_worth_it(costs(0.005, read_s=0.3, overlaps=False), 20)
    assert not is_worth_it(costs(0.005, read_s=0.3), 20)


def test_every_disappointment_in_a_row_doubles_the_pause_up_to_the_longest() -> None:
    patience, pauses = Patience(), []
    for _ in range(8):
        patience = patience.after(1.0, 0.5)
        pauses.append(passes_until_it_drafts_again(patience))
        while patience.is_over:
            patience = patience.after(1.0, 0.5)  # without drafting it shows nothing
    assert pauses == [2, 4, 8, 16, 32, LONGEST_PAUSE, LONGEST_PAUSE, LONGEST_PAUSE]


def test_a_good_pass_forgives_what_was_before_it() -> None:
    late = Patience().after(1.0, 0.5)
    while late.is_over:
        late = late.after(1.0, 0.0)
    assert late.after(1.0, 0.0) == Patience()


@given(st.floats(0.001, 1000), st.floats(1e-6, 1))
def test_a_cheap_draft_works_for_a_small_part_of_the_pass_and_a_dear_one_for_a_trees_steps(
    pass_s: float, share: float
) -> None:
    steps = allowance(pass_s, share * pass_s).steps
    assert steps >= LEAST_STEPS
    assert steps == LEAST_STEPS or WORK_SHARE * 0.9 < steps * share < WORK_SHARE * 1.001
    assert allowance(pass_s, 0.0).steps == LEAST_STEPS


@given(st.floats(0.01, 100), st.floats(0.001, 10))
def test_a_step_that_would_outlast_the_pass_is_not_begun(last_pass_s: float, step_s: float) -> None:
    allowed, steps = allowance(last_pass_s, step_s, last_pass_s), 0
    while allowed.has_room(steps, steps * step_s, step_s):
        steps += 1
    assert steps == allowed.steps or steps * step_s <= last_pass_s <= (steps + 1) * step_s * (1 + 1e-9)
