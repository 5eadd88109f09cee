"""The window in the object store: one process writes, another sees it, no copy in between."""

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import ray

from llmcad_actors.actors import huge_pages
from llmcad_actors.actors.arena import Arena, mapped
from llmcad_actors.storage.direct import BLOCK

SIZE = 8 << 20
TIMEOUT_S = 60


class Writer:
    def __init__(self) -> None:
        self.arena = Arena(SIZE)

    def handle(self) -> tuple[list[Any], int]:
        return self.arena.handle()

    def fill(self, value: int) -> int:
        self.arena.buffer.view(0, SIZE)[:] = value
        return int(self.arena.buffer.view(0, 1).ctypes.data % BLOCK)

    def gather_again(self) -> tuple[int, int]:
        """Bytes gathered around what is certainly mapped, and where nothing is."""
        address = self.arena.buffer.view(0, 1).ctypes.data
        return huge_pages.gather(address, SIZE, os.getppid()), huge_pages.gather(4096, SIZE, os.getppid())


@pytest.fixture(scope="module")
def writer() -> Iterator[Any]:
    ray.init(address="local", num_cpus=1, object_store_memory=100 << 20, include_dashboard=False, log_to_driver=False)
    yield ray.remote(Writer).remote()
    ray.shutdown()


def test_what_one_process_writes_another_sees(writer: Any) -> None:
    seen = mapped(ray.get(writer.handle.remote(), timeout=TIMEOUT_S))
    for value in (1, 2):
        assert ray.get(writer.fill.remote(value), timeout=TIMEOUT_S) == 0  # direct reads need whole blocks
        assert np.all(seen[:SIZE] == value)
    assert not seen.flags.writeable


def test_gathering_pages_changes_no_byte(writer: Any) -> None:
    seen = mapped(ray.get(writer.handle.remote(), timeout=TIMEOUT_S))
    ray.get(writer.fill.remote(3), timeout=TIMEOUT_S)
    gathered, nowhere = ray.get(writer.gather_again.remote(), timeout=TIMEOUT_S)
    assert gathered % huge_pages.HUGE == 0 and gathered <= SIZE and nowhere == 0
    assert np.all(seen[:SIZE] == 3)
