"""A large vocabulary is gone through in parts: whole rows of its logits would take more than the models around them."""

from collections.abc import Iterator

from llmcad_actors.core.budget import LOGITS_BYTES


def parts(rows: int, entries: int) -> Iterator[tuple[int, int]]:
    """(start, end) of parts of a vocabulary, each with at most `LOGITS_BYTES` of float32 logits for so many rows."""
    step = max(1, LOGITS_BYTES // (4 * rows))
    for start in range(0, entries, step):
        yield start, min(start + step, entries)
