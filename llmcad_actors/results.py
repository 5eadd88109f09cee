"""What the engine gives to its caller."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from llmcad_actors.core.choosing import Choosing, TokenLogprobs
from llmcad_actors.core.stats import Stats


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of new text. A provisional piece is a guess: the next piece that is not replaces it."""

    text: str
    token_ids: tuple[int, ...]
    provisional: bool = False
    logprobs: tuple[TokenLogprobs, ...] = ()  # of each token, if they were asked for


@dataclass(frozen=True, slots=True)
class Result:
    """A finished continuation."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str  # "stop" | "length" | "cancelled"; of `--json` also "error" | "interrupted"
    stats: Stats
    seed: int | None = None  # that a sampled text depends on; None: it was not sampled
    logprobs: tuple[TokenLogprobs, ...] | None = None  # of each token, if they were asked for

    def as_dict(self) -> dict[str, Any]:
        """The JSON schema: text, token_ids, finish_reason, stats, and where they were asked for, seed and logprobs."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def put_together(pieces: Sequence[Piece], finish_reason: str, stats: Stats, choosing: Choosing) -> Result:
    """A request's pieces as its result."""
    accepted = [piece for piece in pieces if not piece.provisional]
    logprobs = tuple(each for piece in accepted for each in piece.logprobs)
    return Result(
        "".join(piece.text for piece in accepted),
        tuple(i for piece in accepted for i in piece.token_ids),
        finish_reason,
        stats,
        choosing.seed if choosing.is_sampled else None,
        None if choosing.logprobs is None else logprobs,
    )


@dataclass(frozen=True, slots=True)
class Status:
    """Where the engine is, for a status line: the latest request's figures."""

    shard: str
    shard_index: int
    num_shards: int
    bytes_read: int
    read_seconds: float
    memory_bytes: int
    memory_cap_bytes: int
    new_tokens: int
    tokens_per_pass: float
    seconds: float = 0.0  # from the request's beginning to the end of its latest pass
