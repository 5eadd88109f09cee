"""What the engine gives to its caller."""

from dataclasses import asdict, dataclass
from typing import Any

from llmcad_actors.core.stats import Stats


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of new text. A provisional piece is a guess: the next piece that is not replaces it."""

    text: str
    token_ids: tuple[int, ...]
    provisional: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    """A finished continuation."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str  # "stop" | "length"; of `--json` also "error" | "interrupted"
    stats: Stats

    def as_dict(self) -> dict[str, Any]:
        """The JSON schema: text, token_ids, finish_reason, stats."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Status:
    """Where a running request is, for a status line."""

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
