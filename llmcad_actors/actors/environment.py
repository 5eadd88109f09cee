"""The environment that our actors run in, whichever Ray starts them."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

OF_ACTORS: dict[str, str | None] = {
    "TRANSFORMERS_SDPA_FORCE_GQA": "1",  # grouped heads without copying keys and values: half the attention time
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "8388608",
    "MALLOC_TRIM_THRESHOLD_": "16777216",
    "PYTHONWARNINGS": "ignore",
}


@contextmanager
def environment(values: Mapping[str, str | None]) -> Iterator[None]:
    """Set environment variables, or unset them, inside the block; children started there keep them."""
    before = {name: os.environ.get(name) for name in values}
    _set(values)
    try:
        yield
    finally:
        _set(before)


def _set(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
