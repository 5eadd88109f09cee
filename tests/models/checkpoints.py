"""Tiny targets on disk, and the target of this package over them."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from llmcad_actors.models.target import Target
from llmcad_actors.storage.checkpoint import Checkpoint
from llmcad_actors.storage.layout import layout_of
from tests.fakes import MemoryShards, OneText
from tests.tiny import tiny_llama

CAPACITY = 640
KINDS: dict[str, Callable[[Path], Path]] = {
    "untied, grouped heads": partial(tiny_llama, seed=1),
    "tied": partial(tiny_llama, seed=2, tied=True),
    "several files": partial(tiny_llama, seed=3, max_file="40KB"),
    "a head for each key": partial(tiny_llama, seed=4, kv_heads=6, layers=2),
}


def target_of(
    path: Path,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int | None = None,
    capacity: int = CAPACITY,
    max_nodes: int = 128,
    prefill_chunk: int = 256,
) -> tuple[OneText, MemoryShards]:
    checkpoint = Checkpoint.open(path)
    layout = layout_of(checkpoint, max_shard_bytes=max_shard_bytes)
    shards = MemoryShards(layout)
    rows = {"capacity": capacity, "max_nodes": max_nodes}
    target = Target(checkpoint, layout, shards, dtype=dtype, prefill_chunk=prefill_chunk, **rows)
    return OneText(target), shards
