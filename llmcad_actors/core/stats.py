"""Statistics of a request: one schema for the CLI, the engine and the benchmarks. Reads no clock."""

from dataclasses import dataclass, replace
from typing import Self


@dataclass(frozen=True, slots=True)
class Stats:
    """A value that grows pass by pass. What disk and memory did is for the engine to fill in."""

    seconds: float = 0.0
    time_to_first_token_s: float = 0.0
    new_tokens: int = 0
    target_passes: int = 0
    tokens_per_pass: float = 0.0  # the target's own (bonus) tokens included
    draft_steps: int = 0  # provisional ones included
    drafted_tokens: int = 0  # nodes run through the draft
    verified_nodes: int = 0  # nodes submitted
    accepted_tokens: int = 0  # nodes accepted
    provisional_hits: int = 0  # rounds that began with a head start
    provisional_misses: int = 0  # rounds whose provisional growth was lost
    bytes_read: int = 0
    read_seconds: float = 0.0
    compute_seconds: float = 0.0
    stall_seconds: float = 0.0
    memory_cap_bytes: int = 0
    peak_memory_bytes: int = 0
    pinned_bytes: int = 0
    window_bytes: int = 0
    spilled_bytes: int = 0
    shed_shards: int = 0  # pinned shards given up because memory got short
    cap_exceeded_bytes: int = 0  # how far memory use went above its cap, at most; 0: never
    undrafted_passes: int = 0  # passes without drafting: there was no draft, or it did not pay
    draft_ended: bool = False  # hardly a guess was right: its memory holds layers of the target instead

    def after_pass(
        self,
        *,
        seconds: float,
        new_tokens: int,
        draft_steps: int,
        drafted_tokens: int,
        verified_nodes: int,
        accepted_tokens: int,
        is_hit: bool | None,
        compute_s: float,
        stall_s: float,
        is_drafted: bool,
    ) -> Self:
        """With one more pass. `seconds`: since the request began; `is_hit`: None where nothing had been grown."""
        tokens, passes = self.new_tokens + new_tokens, self.target_passes + 1
        return replace(
            self,
            seconds=seconds,
            time_to_first_token_s=self.time_to_first_token_s if self.target_passes else seconds,
            new_tokens=tokens,
            target_passes=passes,
            tokens_per_pass=tokens / passes,
            draft_steps=self.draft_steps + draft_steps,
            drafted_tokens=self.drafted_tokens + drafted_tokens,
            verified_nodes=self.verified_nodes + verified_nodes,
            accepted_tokens=self.accepted_tokens + accepted_tokens,
            provisional_hits=self.provisional_hits + (is_hit is True),
            provisional_misses=self.provisional_misses + (is_hit is False),
            compute_seconds=self.compute_seconds + compute_s,
            stall_seconds=self.stall_seconds + stall_s,
            undrafted_passes=self.undrafted_passes + (not is_drafted),
        )


@dataclass(frozen=True, slots=True)
class Totals:
    """Of an engine: what all requests that have ended took part in."""

    requests: int = 0
    new_tokens: int = 0
    draft_steps: int = 0
    accepted_tokens: int = 0
    verified_nodes: int = 0

    def plus(self, stats: Stats) -> Self:
        return replace(
            self,
            requests=self.requests + 1,
            new_tokens=self.new_tokens + stats.new_tokens,
            draft_steps=self.draft_steps + stats.draft_steps,
            accepted_tokens=self.accepted_tokens + stats.accepted_tokens,
            verified_nodes=self.verified_nodes + stats.verified_nodes,
        )
