"""The byte budget: how a memory cap is split, before anything starts.

    cap >= overhead + tokenizer + draft weights + draft KV + target resident + target KV + activations
           + window + slack + pinned shards

Target weights come in shards, in the order of the pass. The window holds those under way: the one the verifier
computes with and the next one being read, so room for the two largest streamed shards, and for an extent of them that
does not fit behind the others. Pinned shards are loaded through it too, so it takes the largest shard of all. Under a
cap too small for that, the window holds one shard, and the next is read once it is given back. What is left pins whole
shards for good: a cyclic scan makes LRU useless, a fixed set saves exactly its bytes every pass.

Shards that only a prompt's first pass reads (an encoder's) are pinned last, with what the others leave.

Which shards: spread evenly through the pass, so that reading goes on while a pinned shard computes. A shard bigger
than most (the head, as a rule) may go first: without it the window is smaller. Every such choice is priced, and the
one that streams least wins; as a larger cap allows every choice that a smaller one does, more memory never streams
more.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from llmcad_actors.core.sizes import format_size, is_share, parse_rate, parse_size
from llmcad_actors.errors import MemoryCapError

__all__ = [
    "BudgetInputs",
    "MemoryPlan",
    "Shard",
    "format_size",
    "is_share",
    "parse_rate",
    "parse_size",
    "pinned_besides",
    "plan",
    "smallest_cap",
]

STORE_SLACK_BYTES = 16 << 20  # of the object store: headers, alignment, gaps between objects
EMBEDDING_CACHE_BYTES = 8 << 20  # rows of the target's embedding that are kept
LOGITS_BYTES = 4 << 20  # of float32 logits, in draft and verifier: a large vocabulary is gone through in parts
PREFIX_ROWS = 256  # of a prompt, that the draft runs at once: what they take stays small however long it is
LEAST_STORE_BYTES = 80 << 20  # Ray makes none smaller, and in time all of it is touched
LARGE_CACHE_SHARE = 0.2  # of the least cap: then a shorter context is worth naming
_MB = 10**6


class Shard(NamedTuple):
    """What is streamed as one unit."""

    name: str
    nbytes: int
    room: int  # bytes of the window that it takes: its extents, each widened to whole blocks
    extent: int  # the largest of them
    once: bool = False  # read once a prompt, not in every pass


@dataclass(frozen=True, slots=True)
class BudgetInputs:
    """What each part takes, in bytes."""

    overhead_bytes: int  # processes and the runtime, without weights
    draft_weights: int
    draft_kv: int
    target_resident: int  # final norm and the like
    target_kv: int
    activations: int
    shards: tuple[Shard, ...]  # all layers in the order of the pass, then the head
    tokenizer: int = 0  # in the caller's process


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """A cap, split. All sizes in bytes."""

    cap_bytes: int
    overhead_bytes: int
    draft_weights_bytes: int
    draft_kv_bytes: int
    target_resident_bytes: int
    target_kv_bytes: int
    activations_bytes: int
    slack_bytes: int
    window_bytes: int
    pinned_bytes: int
    bytes_per_pass: int  # streamed, every pass
    pinned: tuple[str, ...]  # shard names, in the order of the pass
    streamed: tuple[str, ...]
    bytes_per_prompt: int = 0  # streamed besides, in a prompt's first pass
    overlaps: bool = True  # the window has room to read a shard while another computes
    tokenizer_bytes: int = 0

    @property
    def store_bytes(self) -> int:
        """Capacity of the object store: shards on their way. Pinned ones move into the verifier's own memory."""
        return self.window_bytes + self.slack_bytes

    @property
    def total_bytes(self) -> int:
        return sum(size for _, size in self.rows())

    @property
    def spare_bytes(self) -> int:
        """Less than a whole shard would need."""
        return self.cap_bytes - self.total_bytes

    def rows(self) -> tuple[tuple[str, int], ...]:
        """(part, bytes), for a table."""
        return (
            ("runtime", self.overhead_bytes),
            ("tokenizer", self.tokenizer_bytes),
            ("draft weights", self.draft_weights_bytes),
            ("draft cache", self.draft_kv_bytes),
            ("target, always resident", self.target_resident_bytes),
            ("target cache", self.target_kv_bytes),
            ("activations", self.activations_bytes),
            ("store slack", self.slack_bytes),
            ("window for streamed shards", self.window_bytes),
            ("pinned shards", self.pinned_bytes),
        )


def plan(inputs: BudgetInputs, cap_bytes: int) -> MemoryPlan:
    """The split that streams least within the cap. Raises MemoryCapError, with a table, if none fits."""
    possible = [_split(inputs, chosen, cap_bytes) for chosen in _choices(inputs.shards)]
    fitting = [split for split in possible if split.total_bytes <= cap_bytes]
    if fitting:
        return min(fitting, key=lambda split: (split.bytes_per_pass, split.bytes_per_prompt, split.total_bytes))
    least = _split(inputs, frozenset(), cap_bytes, overlaps=False)
    if least.total_bytes > cap_bytes:
        raise MemoryCapError(_refusal(least))
    return least


def pinned_besides(memory: MemoryPlan, shards: Sequence[Shard], freed_bytes: int) -> tuple[str, ...]:
    """The shards to pin besides, should `freed_bytes` of a part become free: as many as fit, evenly spread."""
    streamed = [i for i, shard in enumerate(shards) if shard.name in memory.streamed and not shard.once]
    room = freed_bytes + memory.spare_bytes
    for count in range(len(streamed), 0, -1):
        chosen = [shards[i] for i in _spread(streamed, count)]
        if sum(shard.nbytes for shard in chosen) <= room:
            return tuple(shard.name for shard in chosen)
    return ()


def smallest_cap(inputs: BudgetInputs, *, overlaps: bool = False) -> int:
    """The least cap that `plan` accepts, in bytes. overlaps: that leaves room to read while a shard computes."""
    sets = _choices(inputs.shards) if overlaps else [frozenset[int]()]
    return min(_split(inputs, chosen, 0, overlaps).total_bytes for chosen in sets)


def _choices(shards: Sequence[Shard]) -> Iterator[frozenset[int]]:
    """Sets of shards to pin: all above some size, and any number of the others, evenly spread.

    Then, with all of these, any number of those that are read once a prompt.
    """
    every_pass = [i for i, shard in enumerate(shards) if not shard.once]
    sizes = sorted(shards[i].nbytes for i in every_pass)
    median = sizes[len(sizes) // 2] if sizes else 0
    for least in [float("inf"), *sorted({size for size in sizes if size > median}, reverse=True)[:8]]:
        large = [i for i in every_pass if shards[i].nbytes >= least]
        others = [i for i in every_pass if i not in large]
        for count in range(len(others) + 1):
            yield frozenset(large + _spread(others, count))
    once = [i for i, shard in enumerate(shards) if shard.once]
    for count in range(1, len(once) + 1):
        yield frozenset(every_pass + _spread(once, count))


def _spread(items: Sequence[int], count: int) -> list[int]:
    """`count` of the items, evenly spaced."""
    return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]


def _split(inputs: BudgetInputs, pinned: frozenset[int], cap_bytes: int, overlaps: bool = True) -> MemoryPlan:
    shards = inputs.shards
    kept = [shard for i, shard in enumerate(shards) if i in pinned]
    streamed = [shard for i, shard in enumerate(shards) if i not in pinned]
    window = window_bytes(streamed, shards) if overlaps else max((shard.room for shard in shards), default=0)
    return MemoryPlan(
        cap_bytes=cap_bytes,
        overhead_bytes=inputs.overhead_bytes,
        tokenizer_bytes=inputs.tokenizer,
        draft_weights_bytes=inputs.draft_weights,
        draft_kv_bytes=inputs.draft_kv,
        target_resident_bytes=inputs.target_resident,
        target_kv_bytes=inputs.target_kv,
        activations_bytes=inputs.activations,
        slack_bytes=max(STORE_SLACK_BYTES, LEAST_STORE_BYTES - window),
        window_bytes=window,
        overlaps=overlaps,
        pinned_bytes=sum(shard.nbytes for shard in kept),
        bytes_per_pass=sum(shard.nbytes for shard in streamed if not shard.once),
        bytes_per_prompt=sum(shard.nbytes for shard in streamed if shard.once),
        pinned=tuple(shard.name for shard in kept),
        streamed=tuple(shard.name for shard in streamed),
    )


def window_bytes(streamed: Sequence[Shard], shards: Sequence[Shard]) -> int:
    """The window through which `streamed` pass every time, and all `shards` once."""
    largest_two = sorted(shard.room for shard in streamed)[-2:]
    window = max(sum(largest_two), max((shard.room for shard in shards), default=0))
    return window + max((shard.extent for shard in shards), default=0)


def _refusal(least: MemoryPlan) -> str:
    megabytes = -(-least.total_bytes // _MB)
    table = "\n".join(f"  {part:<28}{format_size(size):>12}" for part, size in least.rows() if size)
    others = ["a smaller draft"] if least.draft_weights_bytes else []
    if least.target_kv_bytes > LARGE_CACHE_SHARE * least.total_bytes:
        others.append("a shorter --max-context")
    return (
        f"a memory cap of {format_size(least.cap_bytes)} is too small; the least that works is {megabytes}MB:\n"
        f"{table}\n"
        f"  {'in all':<28}{format_size(least.total_bytes):>12}\n"
        f"Try --memory {', or '.join([f'{megabytes}MB', *others])}."
    )
