"""Drafting ahead pauses where it holds up the verdict, or takes cores from a pass that needs them."""

from hypothesis import given
from hypothesis import strategies as st

from llmcad_actors.core.provisional import (
    DEAR_STEP_SHARE,
    LEAST_STEPS,
    LEAST_WAIT_SHARE,
    LONGEST_PAUSE,
    TOLERATED_SHARE,
    WORK_SHARE,
    Patience,
    Round,
    allowance,
)

GOOD = Round(1.0, late_s=0.0, stall_s=0.5)
LATE = Round(1.0, late_s=0.5, stall_s=0.5)
BOUND_BY_COMPUTING = Round(1.0, stall_s=0.05, draft_step_s=0.005)


def passes_until_it_drafts_again(patience: Patience) -> int:
    count = 0
    while patience.is_over:
        patience, count = patience.after(GOOD), count + 1
    return count


@given(st.floats(0.001, 1000))
def test_a_draft_that_is_in_time_beside_a_pass_that_waits_never_pauses(pass_s: float) -> None:
    shown = Round(pass_s, late_s=TOLERATED_SHARE * pass_s, stall_s=LEAST_WAIT_SHARE * pass_s)
    assert not Patience().after(shown).is_over


@given(st.floats(0.001, 1000), st.floats(0, 0.9))
def test_beside_a_pass_bound_by_computing_only_a_dear_draft_goes_on(pass_s: float, share: float) -> None:
    stall_s = share * LEAST_WAIT_SHARE * pass_s
    cheap = Round(pass_s, stall_s=stall_s, draft_step_s=share * DEAR_STEP_SHARE * pass_s)
    dear = Round(pass_s, stall_s=stall_s, draft_step_s=1.1 * DEAR_STEP_SHARE * pass_s)
    assert Patience().after(cheap).is_over and not Patience().after(dear).is_over


def test_every_disappointment_in_a_row_doubles_the_pause_up_to_the_longest() -> None:
    for bad in (LATE, BOUND_BY_COMPUTING):
        patience, pauses = Patience(), []
        for _ in range(8):
            patience = patience.after(bad)
            pauses.append(passes_until_it_drafts_again(patience))
            while patience.is_over:
                patience = patience.after(bad)  # without drafting it shows nothing
        assert pauses == [2, 4, 8, 16, 32, LONGEST_PAUSE, LONGEST_PAUSE, LONGEST_PAUSE]


def test_a_good_pass_forgives_what_was_before_it() -> None:
    late = Patience().after(LATE)
    while late.is_over:
        late = late.after(GOOD)
    assert late.after(GOOD) == Patience()


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
