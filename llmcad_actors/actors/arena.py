"""One object in Ray's store as shared memory: the loader reads the disk straight into it, the verifier maps it.

A `ray.put` per shard would copy every weight once more, which on two cores costs more than computing with it. So the
window is put once, and used again and again under the loader's leases. The object never leaves its machine: a copy
on another node would not see what is read later.
"""

import ctypes
import os
from typing import Any

import numpy as np
import ray

from llmcad_actors.actors.huge_pages import in_huge_pages
from llmcad_actors.storage.direct import BLOCK, AlignedBuffer

GET_TIMEOUT_S = 60.0


class Arena:
    """The owner's side."""

    def __init__(self, nbytes: int) -> None:
        """Put `nbytes`; putting touches all pages."""
        self.reference = ray.put(np.zeros(nbytes + 2 * BLOCK, np.uint8))
        self._object: np.ndarray = ray.get(self.reference, timeout=GET_TIMEOUT_S)
        self.offset = -self._object.ctypes.data % BLOCK  # of the buffer in the object
        address = self._object.ctypes.data + self.offset
        memory = in_huge_pages(address, nbytes, os.getppid())  # the raylet holds the store's file
        self.buffer = AlignedBuffer.over(memory or (ctypes.c_uint8 * nbytes).from_address(address), nbytes)

    def handle(self) -> tuple[list[Any], int]:
        """What another process of this machine needs to `mapped` it."""
        return [self.reference], self.offset


def mapped(handle: tuple[list[Any], int]) -> np.ndarray:
    """The arena as the other processes see it: uint8, read-only, without a copy."""
    (reference,), offset = handle
    whole: np.ndarray = ray.get(reference, timeout=GET_TIMEOUT_S)
    return whole[offset:]
