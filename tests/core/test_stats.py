import dataclasses

import pytest

from llmcad_actors.core.stats import Stats

SCHEMA = [
    "seconds",
    "time_to_first_token_s",
    "new_tokens",
    "target_passes",
    "tokens_per_pass",
    "draft_steps",
    "drafted_tokens",
    "verified_nodes",
    "accepted_tokens",
    "provisional_hits",
    "provisional_misses",
    "bytes_read",
    "read_seconds",
    "compute_seconds",
    "stall_seconds",
    "memory_cap_bytes",
    "peak_memory_bytes",
    "pinned_bytes",
    "window_bytes",
    "spilled_bytes",
    "shed_shards",
    "cap_exceeded_bytes",
    "undrafted_passes",
    "draft_ended",
]


def passed(stats: Stats, seconds: float, new_tokens: int, is_hit: bool | None) -> Stats:
    return stats.after_pass(
        seconds=seconds,
        new_tokens=new_tokens,
        draft_steps=5,
        drafted_tokens=40,
        verified_nodes=30,
        accepted_tokens=new_tokens - 1,
        is_hit=is_hit,
        compute_s=0.25,
        stall_s=0.5,
        is_drafted=is_hit is not False,
    )


def test_the_schema_is_the_published_one() -> None:
    assert [field.name for field in dataclasses.fields(Stats)] == SCHEMA


def test_passes_add_up() -> None:
    stats = passed(passed(passed(Stats(), 2.0, 4, None), 3.0, 1, False), 4.5, 5, True)
    assert stats == Stats(
        seconds=4.5,
        time_to_first_token_s=2.0,
        new_tokens=10,
        target_passes=3,
        tokens_per_pass=10 / 3,
        draft_steps=15,
        drafted_tokens=120,
        verified_nodes=90,
        accepted_tokens=7,
        provisional_hits=1,
        provisional_misses=1,
        compute_seconds=0.75,
        stall_seconds=1.5,
        undrafted_passes=1,
    )


def test_statistics_are_values() -> None:
    stats = Stats()
    passed(stats, 1.0, 1, None)
    assert stats == Stats()
    with pytest.raises(dataclasses.FrozenInstanceError):
        stats.seconds = 1.0  # type: ignore[misc]
