"""Drafting ahead pauses where it holds up the verdict."""

from hypothesis import given
from hypothesis import strategies as st

from llmcad_actors.core.provisional import LONGEST_PAUSE, TOLERATED_SHARE, Patience


def passes_until_it_drafts_again(patience: Patience) -> int:
    count = 0
    while patience.is_over:
        patience, count = patience.after(0.0, 1.0), count + 1
    return count


@given(st.floats(0.001, 1000))
def test_a_draft_that_is_in_time_never_pauses(pass_s: float) -> None:
    assert not Patience().after(TOLERATED_SHARE * pass_s, pass_s).is_over


def test_every_delay_in_a_row_doubles_the_pause_up_to_the_longest() -> None:
    patience, pauses = Patience(), []
    for _ in range(8):
        patience = patience.after(0.5, 1.0)
        pauses.append(passes_until_it_drafts_again(patience))
        while patience.is_over:
            patience = patience.after(0.0, 1.0)
    assert pauses == [2, 4, 8, 16, 32, LONGEST_PAUSE, LONGEST_PAUSE, LONGEST_PAUSE]


def test_a_pass_in_time_forgives_the_delays_before_it() -> None:
    late = Patience().after(0.5, 1.0)
    while late.is_over:
        late = late.after(0.0, 1.0)
    assert late.after(0.0, 1.0) == Patience()
