"""The window in the object store: one process writes, another sees it, no copy in between."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from llmcad_actors.actors import huge_pages
from llmcad_actors.actors.arena import Arena, mapped
from llmcad_actors.storage.direct import BLOCK

SIZE = 8 << 20
STORE = (100 << 20) + 12288  # a store of whole huge pages may be aligned by itself
TIMEOUT_S = 60


class Writer:
    def __init__(self) -> None:
        self.arena = Arena(SIZE)

    def handle(self) -> tuple[list[Any], int]:
        return self.arena.handle()

    def fill(self, value: int) -> int:
        self.arena.buffer.view(0, SIZE)[:] = value
        return int(self.arena.buffer.view(0, 1).ctypes.data % BLOCK)

    def is_in_huge_pages(self) -> bool:
        """Whether the buffer lies as its file does: the store's own mapping does not."""
        address = self.arena.buffer.view(0, 1).ctypes.data
        start, offset, _ = huge_pages._mapping(address)
        return (start - offset) % huge_pages.HUGE == 0

    def again(self, address: int | None) -> bytes | None:
        """What stands at the beginning of the buffer mapped once more (or of another address), and the map's end."""
        address = address or self.arena.buffer.view(0, 1).ctypes.data
        memory = huge_pages.in_huge_pages(address, SIZE, os.getppid())
        return None if memory is None else bytes(memory[:1] + memory[-1:])

    def num_mappings(self) -> int:
        return len(Path("/proc/self/maps").read_text().splitlines())


@pytest.fixture(scope="module")
def writer() -> Iterator[Any]:
    ray.init(address="local", num_cpus=1, object_store_memory=STORE, include_dashboard=False, log_to_driver=False)
    yield ray.remote(Writer).remote()
    ray.shutdown()


def test_what_one_process_writes_another_sees(writer: Any) -> None:
    seen = mapped(ray.get(writer.handle.remote(), timeout=TIMEOUT_S))
    for value in (1, 2):
        assert ray.get(writer.fill.remote(value), timeout=TIMEOUT_S) == 0  # direct reads need whole blocks
        assert np.all(seen[:SIZE] == value)
    assert not seen.flags.writeable


def test_the_disk_writes_where_memory_and_file_are_aligned_alike(writer: Any) -> None:
    seen = mapped(ray.get(writer.handle.remote(), timeout=TIMEOUT_S))
    assert ray.get(writer.is_in_huge_pages.remote(), timeout=TIMEOUT_S)
    ray.get(writer.fill.remote(3), timeout=TIMEOUT_S)
    assert np.all(seen[:SIZE] == 3)


def test_mapping_once_more_ends_with_its_use_and_is_a_wish(writer: Any) -> None:
    ray.get(writer.fill.remote(5), timeout=TIMEOUT_S)
    before = ray.get(writer.num_mappings.remote(), timeout=TIMEOUT_S)
    for _ in range(20):
        assert ray.get(writer.again.remote(None), timeout=TIMEOUT_S) == bytes([5, 5])
    assert ray.get(writer.num_mappings.remote(), timeout=TIMEOUT_S) < before + 20
    assert ray.get(writer.again.remote(4096), timeout=TIMEOUT_S) is None  # nothing is mapped there
