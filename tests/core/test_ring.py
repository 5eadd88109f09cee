"""The ring: stretches never overlap, never leave the buffer, and all room comes back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmcad_actors.core.ring import Ring


@given(data=st.data(), capacity=st.integers(1, 40))
def test_stretches_in_use_never_overlap_nor_leave_the_buffer(data: st.DataObject, capacity: int) -> None:
    ring = Ring(capacity)
    held: dict[int, int] = {}
    steps: int = data.draw(st.integers(1, 60))
    for _ in range(steps):
        release: bool = data.draw(st.booleans())
        if held and release:
            start: int = data.draw(st.sampled_from(sorted(held)))
            ring.give_back(start)
            del held[start]
        else:
            nbytes: int = data.draw(st.integers(1, capacity))
            start_or_none = ring.take(nbytes)
            if start_or_none is not None:
                new = range(start_or_none, start_or_none + nbytes)
                assert new.stop <= capacity
                assert all(new.stop <= start or start + n <= new.start for start, n in held.items())
                held[start_or_none] = nbytes
        assert sum(held.values()) <= ring.used <= capacity
    for start in list(held):
        ring.give_back(start)
    assert ring.used == 0
    assert ring.take(capacity) == 0


def test_room_is_taken_round_and_round() -> None:
    ring = Ring(10)
    assert [ring.take(4), ring.take(4), ring.take(4)] == [0, 4, None]
    ring.give_back(0)
    assert [ring.take(5), ring.take(3), ring.take(1), ring.take(1)] == [None, 0, 3, None]
    ring.give_back(4)
    assert [ring.take(6), ring.take(1)] == [4, None]


def test_room_comes_back_in_the_order_in_which_it_was_taken() -> None:
    ring = Ring(10)
    first, second = ring.take(5), ring.take(5)
    assert first is not None and second is not None
    ring.give_back(second)
    assert ring.take(1) is None
    ring.give_back(first)
    assert ring.used == 0


def test_what_nobody_holds_cannot_be_given_back() -> None:
    ring = Ring(10)
    with pytest.raises(KeyError):
        ring.give_back(0)
    with pytest.raises(ValueError, match="0 bytes"):
        ring.take(0)
