import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llmcad_actors.core.readahead import Readahead
from llmcad_actors.errors import OverBudgetError


class ReadaheadMachine(RuleBasedStateMachine):
    """A loader and a verifier in any order of events, with bytes counted on the outside."""

    @initialize(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6), spare=st.integers(0, 25))
    def begin(self, sizes: list[int], spare: int) -> None:
        self.sizes = sizes
        self.window = max(sum(sorted(sizes)[-2:]), max(sizes)) + spare
        self.ahead = Readahead(sizes, self.window)
        self.reading: list[int] = []
        self.ready: set[int] = set()
        self.leases: list[int] = []
        self.wanted = 0

    @rule()
    def read(self) -> None:
        shard = self.ahead.next_to_read()
        if shard is not None:
            self.reading.append(shard)

    @precondition(lambda self: self.reading)
    @rule(data=st.data())
    def finish_reading(self, data: st.DataObject) -> None:
        shard = self.reading.pop(data.draw(st.integers(0, len(self.reading) - 1)))
        if self.ahead.loaded(shard):
            assert shard not in self.ready
            self.ready.add(shard)

    @precondition(lambda self: self.reading)
    @rule(data=st.data())
    def fail_reading(self, data: st.DataObject) -> None:
        self.ahead.lost(self.reading.pop(data.draw(st.integers(0, len(self.reading) - 1))))

    @precondition(lambda self: self.ready)
    @rule(data=st.data())
    def lose_what_was_ready(self, data: st.DataObject) -> None:
        shard = data.draw(st.sampled_from(sorted(self.ready)))
        self.ready.remove(shard)
        self.ahead.lost(shard)

    @precondition(lambda self: self.wanted in self.ready and len(self.leases) < 2)
    @rule()
    def lease(self) -> None:
        self.ahead.leased(self.wanted)
        self.ready.remove(self.wanted)
        self.leases.append(self.wanted)
        self.wanted = (self.wanted + 1) % len(self.sizes)

    @precondition(lambda self: self.leases)
    @rule()
    def release(self) -> None:
        self.ahead.released(self.leases.pop(0))

    @rule(data=st.data())
    def rewind(self, data: st.DataObject) -> None:
        self.wanted = data.draw(st.integers(0, len(self.sizes) - 1))
        assert set(self.ahead.rewind(self.wanted)) == self.ready
        self.ready.clear()

    @invariant()
    def bytes_never_exceed_the_window(self) -> None:
        held = sum(self.sizes[i] for i in [*self.reading, *self.ready, *self.leases])
        assert held == self.ahead.held_bytes <= self.window

    @invariant()
    def the_ready_shards_are_known(self) -> None:
        assert self.ahead.ready == self.ready

    def teardown(self) -> None:
        """However things stand, a verifier that holds one lease and asks for the next gets it."""
        if not hasattr(self, "ahead"):
            return
        at_once = min(len(self.sizes), 2)  # a window for one shard cannot hold it twice
        for _ in range(3 * len(self.sizes)):
            while len(self.leases) >= at_once:
                self.release()
            self.serve()
            self.lease()

    def serve(self) -> None:
        for _ in range(100):
            if self.wanted in self.ready:
                return
            self.read()
            if self.reading and self.ahead.loaded(shard := self.reading.pop(0)):
                self.ready.add(shard)
        raise AssertionError(f"deadlock: {self.wanted} never comes with {self.leases} leased")


TestReadahead = ReadaheadMachine.TestCase


def read_all(ahead: Readahead) -> list[int]:
    found = []
    while (shard := ahead.next_to_read()) is not None:
        found.append(shard)
        assert ahead.loaded(shard)
    return found


def test_reading_goes_on_into_the_next_pass() -> None:
    ahead = Readahead([4, 4, 4], 8)
    assert read_all(ahead) == [0, 1]
    for shard, follows in ((0, 2), (1, 0), (2, 1), (0, 2)):
        ahead.leased(shard)
        assert ahead.next_to_read() is None
        ahead.released(shard)
        assert read_all(ahead) == [follows]


def test_the_window_is_used_as_far_as_it_reaches() -> None:
    assert read_all(Readahead([4, 4, 4, 4], 13)) == [0, 1, 2]
    assert read_all(Readahead([4, 4, 4, 4], 100)) == [0, 1, 2, 3]
    assert read_all(Readahead([4, 9, 1], 12)) == [0]  # no skipping past a shard without room


def test_a_lost_shard_is_read_next() -> None:
    ahead = Readahead([4, 4, 4], 8)
    read_all(ahead)
    ahead.lost(0)
    assert read_all(ahead) == [0]


def test_after_a_rewind_what_was_on_its_way_is_dropped() -> None:
    ahead = Readahead([4, 4, 4], 8)
    assert (ahead.next_to_read(), ahead.next_to_read()) == (0, 1)
    ahead.rewind(2)
    assert ahead.next_to_read() is None
    assert not ahead.loaded(0) and not ahead.loaded(1)
    assert read_all(ahead) == [2, 0]


def test_shards_are_leased_in_the_order_of_the_pass() -> None:
    ahead = Readahead([4, 4], 8)
    with pytest.raises(ValueError, match="cannot be leased"):
        ahead.leased(0)
    read_all(ahead)
    with pytest.raises(ValueError, match="cannot be leased"):
        ahead.leased(1)
    with pytest.raises(ValueError, match="not leased"):
        ahead.released(0)


def test_a_window_smaller_than_a_shard_is_refused() -> None:
    with pytest.raises(OverBudgetError, match="9 bytes"):
        Readahead([4, 9], 8)
    assert Readahead([], 0).next_to_read() is None
