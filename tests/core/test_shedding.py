"""Pinned shards are given up when memory is short, taken back when there is room, and never to and fro."""

from hypothesis import given
from hypothesis import strategies as st

from llmcad_actors.core.shedding import MOST_PATIENCE_PASSES, PATIENCE_PASSES, MemorySample, Shedding

GB = 1_000_000_000
MB = 1_000_000
sizes = st.lists(st.integers(1 * MB, 500 * MB), min_size=1, max_size=12).map(lambda s: tuple(sorted(s, reverse=True)))
samples = st.builds(
    MemorySample,
    used=st.integers(0, 4 * GB),
    cap=st.integers(1 * GB, 4 * GB),
    free=st.integers(0, 8 * GB),
    limit=st.integers(4 * GB, 32 * GB),
)


def sample(room: int) -> MemorySample:
    """A machine without bounds, under a cap that leaves so much."""
    return MemorySample(used=4 * GB - 4 * GB // 128 - room, cap=4 * GB, free=100 * GB, limit=100 * GB)


@given(sizes=sizes, held=st.integers(0, 12), sample=samples, passes=st.integers(0, 100))
def test_what_is_given_up_is_enough_and_no_shard_more(
    sizes: tuple[int, ...], held: int, sample: MemorySample, passes: int
) -> None:
    before = Shedding(sizes, min(held, len(sizes)))
    after = before.after(sample, passes)
    freed = sum(sizes[after.held : before.held])
    if sample.room < 0:
        assert after.held == 0 or freed >= -sample.room
        assert after.held == before.held or freed - sizes[after.held] < -sample.room
    else:
        assert before.held <= after.held <= min(before.held + 1, len(sizes))


@given(sizes=sizes, rooms=st.lists(st.integers(-600 * MB, 1500 * MB), max_size=60))
def test_nothing_is_taken_back_soon_or_without_room_for_two(sizes: tuple[int, ...], rooms: list[int]) -> None:
    state, changed = Shedding.of(sizes), 0
    for passes, room in enumerate(rooms):
        successor = state.after(sample(room), passes)
        if successor.held > state.held:
            assert passes - changed >= PATIENCE_PASSES
            assert room >= 2 * sizes[state.held]
        if room < 0 or successor.held != state.held:
            changed = passes
        state = successor


@given(sizes=sizes, later=sizes, rooms=st.lists(st.integers(-600 * MB, 1500 * MB), max_size=60))
def test_what_has_no_room_beside_the_draft_waits_for_its_end(
    sizes: tuple[int, ...], later: tuple[int, ...], rooms: list[int]
) -> None:
    state = Shedding.of(sizes, later)
    assert state.held == len(sizes)
    for passes, room in enumerate(rooms):
        state = state.after(sample(room), passes)
        assert state.held <= len(sizes)
    state = state.without_draft()
    assert state.held == len(state.sizes) == len(sizes) + len(later)
    assert state.after(sample(0), 100).held == len(state.sizes)
    assert state.after(sample(-1), 100).held == len(state.sizes) - 1  # of `later` first


@given(sizes=sizes, outside=st.integers(0, 8 * GB))
def test_a_constant_shortage_ends_at_rest(sizes: tuple[int, ...], outside: int) -> None:
    """What others take stays; after the first answer nothing is given up again, whatever is taken back."""
    state, held = Shedding.of(sizes), []
    for passes in range(300):
        used = GB + sum(sizes[: state.held])
        state = state.after(MemorySample(used, 16 * GB, 8 * GB - outside - used, 8 * GB), passes)
        held.append(state.held)
    assert held == sorted(held)
    assert len(set(held[-100:])) == 1


def test_room_that_comes_and_goes_is_waited_for_longer_each_time() -> None:
    state, waits, shed_at, passes = Shedding.of((100 * MB,)), [], 0, 0
    for _ in range(7):
        state, shed_at = state.after(sample(-MB), passes), passes
        while not state.held:
            passes += 1
            state = state.after(sample(200 * MB), passes)
        waits.append(passes - shed_at)
    assert waits == [5, 9, 17, 33, 65, 65, 65]  # the wait counts from the sample after
    assert waits[-1] == MOST_PATIENCE_PASSES + 1


def test_the_cap_and_the_machine_each_have_a_margin() -> None:
    assert MemorySample(used=0, cap=128 * MB, free=100 * GB, limit=100 * GB).room == 127 * MB
    assert MemorySample(used=0, cap=100 * GB, free=3 * MB, limit=64 * MB).room == 2 * MB
    assert MemorySample(used=0, cap=100 * GB, free=256 << 20, limit=100 * GB).room == 0
