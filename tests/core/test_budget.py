import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmcad_actors.core.budget import (
    LEAST_STORE_BYTES,
    STORE_SLACK_BYTES,
    BudgetInputs,
    MemoryPlan,
    Shard,
    format_size,
    parse_size,
    pinned_besides,
    plan,
    smallest_cap,
)
from llmcad_actors.errors import MemoryCapError

MB = 10**6
sizes = st.integers(0, 500 * MB)
shards = st.lists(st.integers(1, 800 * MB), min_size=1, max_size=40) | st.tuples(
    st.integers(1, 60), st.integers(1, 400 * MB), st.integers(1, 2000 * MB)
).map(lambda model: [model[1]] * model[0] + [model[2]])


@st.composite
def budgets(draw: st.DrawFn) -> BudgetInputs:
    overhead, weights, kv, resident, target_kv, activations, tokenizer = (draw(sizes) for _ in range(7))
    parts = tuple(Shard(f"s{i}", size, size + 4096, min(size, 32 * MB)) for i, size in enumerate(draw(shards)))
    return BudgetInputs(overhead, weights, kv, resident, target_kv, activations, parts, tokenizer)


def inputs_of(*shard_sizes: int, tokenizer: int = 0) -> BudgetInputs:
    named = tuple(Shard(f"s{i}", size * MB, size * MB, 10 * MB) for i, size in enumerate(shard_sizes))
    return BudgetInputs(300 * MB, 100 * MB, 20 * MB, 1 * MB, 30 * MB, 40 * MB, named, tokenizer)


def by_part(split: MemoryPlan) -> dict[str, int]:
    return dict(split.rows())


@given(budgets(), st.integers(0, 30_000 * MB))
def test_the_parts_never_exceed_the_cap(inputs: BudgetInputs, cap: int) -> None:
    try:
        split = plan(inputs, cap)
    except MemoryCapError:
        return
    assert sum(size for _, size in split.rows()) == split.total_bytes <= cap == split.cap_bytes
    assert split.spare_bytes == cap - split.total_bytes


@given(budgets(), st.integers(0, 30_000 * MB), st.integers(0, 3000 * MB))
def test_more_memory_never_streams_more(inputs: BudgetInputs, extra: int, more: int) -> None:
    cap = smallest_cap(inputs) + extra
    assert plan(inputs, cap + more).bytes_per_pass <= plan(inputs, cap).bytes_per_pass


@given(budgets(), st.integers(0, 3000 * MB), st.integers(0, 1000 * MB), st.integers(0, 1000 * MB))
def test_what_becomes_free_pins_as_many_streamed_shards_as_fit(
    inputs: BudgetInputs, extra: int, freed: int, more: int
) -> None:
    split = plan(inputs, smallest_cap(inputs) + extra)
    chosen = pinned_besides(split, inputs.shards, freed)
    sizes = {shard.name: shard.nbytes for shard in inputs.shards}
    assert set(chosen) <= set(split.streamed)
    assert sum(sizes[name] for name in chosen) <= freed + split.spare_bytes
    assert len(chosen) <= len(pinned_besides(split, inputs.shards, freed + more))
    if len(set(sizes.values())) == 1 and len(chosen) < len(split.streamed):
        assert (len(chosen) + 1) * inputs.shards[0].nbytes > freed + split.spare_bytes


@given(budgets())
def test_the_smallest_cap_named_in_a_refusal_is_accepted_and_nothing_below_it(inputs: BudgetInputs) -> None:
    least = smallest_cap(inputs)
    plan(inputs, least)
    with pytest.raises(MemoryCapError) as refusal:
        plan(inputs, least - 1)
    suggested = re.search(r"--memory (\w+)", str(refusal.value))
    assert suggested is not None
    assert least <= plan(inputs, parse_size(suggested[1], 1)).cap_bytes < least + MB


@given(budgets(), st.integers(0, 30_000 * MB))
def test_every_shard_is_pinned_or_streamed_and_the_window_holds_any_two_streamed(
    inputs: BudgetInputs, extra: int
) -> None:
    split = plan(inputs, smallest_cap(inputs, overlaps=True) + extra)
    assert split.overlaps
    size = {shard.name: shard.nbytes for shard in inputs.shards}
    room = {shard.name: shard.room for shard in inputs.shards}
    assert sorted(split.pinned + split.streamed) == sorted(size)
    assert list(split.streamed) == [name for name in size if name in split.streamed]
    assert split.pinned_bytes == sum(size[name] for name in split.pinned)
    assert split.bytes_per_pass == sum(size[name] for name in split.streamed)
    two = sum(sorted(room[name] for name in split.streamed)[-2:])
    assert split.window_bytes == max(two, max(room.values())) + max(shard.extent for shard in inputs.shards)
    assert split.store_bytes == split.window_bytes + split.slack_bytes
    assert split.store_bytes >= LEAST_STORE_BYTES and split.slack_bytes >= STORE_SLACK_BYTES


@given(budgets())
def test_below_that_the_window_holds_one_shard_and_everything_streams(inputs: BudgetInputs) -> None:
    enough = smallest_cap(inputs, overlaps=True)
    for cap in {enough - 1, smallest_cap(inputs)} - {enough}:
        if cap < smallest_cap(inputs):
            continue
        split = plan(inputs, cap)
        assert not split.overlaps and split.pinned == ()
        assert split.window_bytes == max(shard.room for shard in inputs.shards)


@given(budgets())
def test_everything_is_pinned_when_everything_fits(inputs: BudgetInputs) -> None:
    split = plan(inputs, 10**12)
    assert split.streamed == () and split.bytes_per_pass == 0
    largest, extent = max(s.room for s in inputs.shards), max(s.extent for s in inputs.shards)
    assert split.window_bytes == largest + extent  # to load them through


def test_each_part_is_what_was_said() -> None:
    split = plan(inputs_of(50, 50, 50, 50, tokenizer=90 * MB), 760 * MB + STORE_SLACK_BYTES)
    assert by_part(split) == {
        "runtime": 300 * MB,
        "tokenizer": 90 * MB,
        "draft weights": 100 * MB,
        "draft cache": 20 * MB,
        "target, always resident": 1 * MB,
        "target cache": 30 * MB,
        "activations": 40 * MB,
        "store slack": STORE_SLACK_BYTES,
        "window for streamed shards": 110 * MB,
        "pinned shards": 50 * MB,
    }


def test_pinned_shards_are_spread_evenly_through_the_pass() -> None:
    inputs = inputs_of(*[50] * 12)
    needed = smallest_cap(inputs, overlaps=True)
    assert plan(inputs, needed + 150 * MB).pinned == ("s2", "s6", "s10")


def test_a_big_head_is_pinned_first_where_that_streams_less() -> None:
    inputs = inputs_of(*[50] * 10, 400)
    with_head = plan(inputs, smallest_cap(inputs, overlaps=True) + 350 * MB)
    assert with_head.pinned == ("s10",) and with_head.bytes_per_pass == 500 * MB  # seven layers would leave 550


def test_room_too_small_for_the_head_still_pins_layers() -> None:
    inputs = inputs_of(*[50] * 20, 60)
    base = plan(inputs, smallest_cap(inputs, overlaps=True))
    assert len(plan(inputs, base.total_bytes + 55 * MB).pinned) >= 1


def test_a_refusal_says_what_needs_what() -> None:
    with pytest.raises(MemoryCapError) as refusal:
        plan(inputs_of(50, 50, 50), 200 * MB)
    message = str(refusal.value)
    assert "200.0 MB is too small" in message and "a smaller draft" in message
    for part in ("runtime", "draft weights", "window for streamed shards", "activations"):
        assert part in message
    assert re.search(r"runtime +300\.0 MB", message) and f"{format_size(491 * MB + LEAST_STORE_BYTES):>12}" in message
    without = replace(inputs_of(50, 50, 50), draft_weights=0)
    with pytest.raises(MemoryCapError) as refusal:
        plan(without, 200 * MB)
    advice = str(refusal.value).splitlines()[-1]
    assert "draft" not in advice and "context" not in advice
    with pytest.raises(MemoryCapError, match="a shorter --max-context"):
        plan(replace(without, target_kv=500 * MB), 200 * MB)


@given(budgets(), st.integers(1, 39), st.integers(0, 30_000 * MB), st.integers(0, 3000 * MB))
def test_what_is_read_once_a_prompt_is_pinned_only_with_all_the_rest(
    inputs: BudgetInputs, num_once: int, extra: int, more: int
) -> None:
    parts = tuple(shard._replace(once=i < num_once) for i, shard in enumerate(inputs.shards))
    inputs = replace(inputs, shards=parts)
    cap = smallest_cap(inputs) + extra
    split, larger = plan(inputs, cap), plan(inputs, cap + more)
    size = {shard.name: shard.nbytes for shard in parts}
    once = {shard.name for shard in parts if shard.once}
    assert split.bytes_per_pass == sum(size[name] for name in set(split.streamed) - once)
    assert split.bytes_per_prompt == sum(size[name] for name in set(split.streamed) & once)
    assert once.isdisjoint(split.pinned) or once.issuperset(split.streamed)
    now, then = ((p.bytes_per_pass, p.bytes_per_prompt) for p in (split, larger))
    assert then <= now
