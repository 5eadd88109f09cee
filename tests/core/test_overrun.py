"""Memory above the cap is said once nothing more can be given up, again when it gets worse, and counted exactly."""

from hypothesis import given
from hypothesis import strategies as st

from llmcad_actors.core.overrun import NOTABLY, PATIENCE, Overrun

MB = 10**6
CAP = 1000 * MB
samples = st.lists(st.tuples(st.integers(0, 3 * CAP), st.booleans()), max_size=30)


def watched(uses: list[tuple[int, bool]], cap: int = CAP) -> tuple[Overrun, list[str]]:
    said: list[str] = []
    overrun = Overrun(cap, said.append)
    for used, helped in uses:
        overrun.record(used)
        overrun.say(used, helped)
    return overrun, said


@given(samples)
def test_the_excess_is_the_largest_one(uses: list[tuple[int, bool]]) -> None:
    overrun, said = watched(uses)
    assert overrun.exceeded_bytes == max([0, *(used - CAP for used, _ in uses)])
    assert bool(said) <= (overrun.exceeded_bytes > 0)


@given(samples)
def test_a_sample_above_the_cap_that_nothing_helps_is_said_at_once(uses: list[tuple[int, bool]]) -> None:
    helpless = any(used > CAP and not helped for used, helped in uses)
    if helpless:
        assert watched(uses)[1]
    if not any(used > CAP for used, _ in uses):
        assert not watched(uses)[1]


def test_it_says_how_much_and_what_to_do() -> None:
    (said,) = watched([(1460 * MB, False)], cap=1200 * MB)[1]
    assert "memory use of 1.46 GB is above the cap of 1.20 GB by 260.0 MB" in said
    assert "--max-context" in said


def test_while_shards_are_on_their_way_out_it_waits_but_not_for_ever() -> None:
    above = (CAP + 1, True)
    assert not watched([above] * (PATIENCE - 1))[1]
    assert not watched([above, (CAP, True)] * PATIENCE)[1]
    assert len(watched([above] * (3 * PATIENCE))[1]) == 1
    assert len(watched([above, (CAP + 1, False)])[1]) == 1


def test_it_is_said_again_only_when_it_gets_notably_worse() -> None:
    over, step = CAP + 5 * MB, CAP // NOTABLY
    assert len(watched([(over, False)] * 5)[1]) == 1
    assert len(watched([(over, False), (over + step, False)])[1]) == 1
    assert len(watched([(over, False), (over + step + 1, False)])[1]) == 2


def test_a_new_request_has_an_excess_of_its_own() -> None:
    overrun, said = watched([(CAP + 7 * MB, False)])
    overrun.begin()
    assert overrun.exceeded_bytes == 0
    overrun.record(CAP + 3 * MB)
    overrun.say(CAP + 3 * MB, False)
    assert overrun.exceeded_bytes == 3 * MB
    assert len(said) == 2
