"""The package's own kernels, `kernels.c`: whether they were built, which instructions they use, their threads.

A result's bits depend on the instructions, and on nothing else: not on the rows beside a row, not on threads.
"""

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from importlib.machinery import PathFinder

import torch

import llmcad_actors.kernels
from llmcad_actors.errors import ConfigError

SETS = ("portable", "avx2", "avx512", "amx", "neon")
"""Of instructions, slow ones first, as in kernels.h."""

VARIABLE = "LLMCAD_KERNELS"
"""Names the set to use instead of the fastest that the processor has; "none": torch's own products instead."""


class Threads:
    """Who has the cores, torch or the kernels: OpenMP's threads spin on after every product, and would take them."""

    def __init__(self) -> None:
        self._taken = 0

    @property
    def count(self) -> int:
        """The kernels'."""
        return self._taken or torch.get_num_threads()

    @contextmanager
    def taken(self) -> Iterator[None]:
        """The kernels keep all of torch's threads inside, and torch one of them."""
        self._taken = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(self._taken)
            self._taken = 0


class Instructions:
    """Which set the kernels use; tests try each that the machine has."""

    def __init__(self) -> None:
        self._forced: str | None = None

    @property
    def name(self) -> str:
        """One of SETS, or "none"."""
        return _wanted() if self._forced is None else self._forced

    @property
    def index(self) -> int:
        return SETS.index(self.name)

    @contextmanager
    def forced(self, name: str) -> Iterator[None]:
        """That set inside, which must be among `sets()`."""
        before, self._forced = self._forced, name
        try:
            yield
        finally:
            self._forced = before


threads, instructions = Threads(), Instructions()


def available() -> bool:
    """Whether the kernels were built, and are wanted; else torch has to do."""
    return library() is not None and instructions.name != "none"


@cache
def sets() -> tuple[str, ...]:
    """Those of SETS that this machine has, the fastest last; none where the kernels were not built."""
    built = library()
    return () if built is None else tuple(name for i, name in enumerate(SETS) if built.llmcad_has(i))


@cache
def _wanted() -> str:
    wanted = os.environ.get(VARIABLE, "").strip().lower()
    if not wanted:
        return sets()[-1] if sets() else "none"
    if wanted != "none" and wanted not in sets():
        raise ConfigError(f"{VARIABLE} is {wanted!r}; this machine has {', '.join((*sets(), 'none'))}")
    return wanted


def pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def on_threads(work: Callable[[ctypes.c_long], None], count: int) -> None:
    """Run `work` here and in `count - 1` other threads; it takes pieces from the counter that it is given.

    Threads share the work as they come: one that is held up by another program holds up nobody, and one that has not
    begun when this one ends is not needed.
    """
    taken = ctypes.c_long(0)
    others = max(count - 1, 0)
    started = [_pool(others, threading.get_ident()).submit(work, taken) for _ in range(others)]
    work(taken)
    for other in started:
        if not other.cancel():
            other.result()


@cache
def _pool(count: int, caller: int) -> ThreadPoolExecutor:
    """Of each caller's own: threads take their scheduling from the one that starts them."""
    return ThreadPoolExecutor(count, thread_name_prefix="kernels")


@cache
def library() -> ctypes.CDLL | None:
    """The kernels as they were built, or None."""
    spec = PathFinder.find_spec("llmcad_actors.kernels.native", llmcad_actors.kernels.__path__)
    if spec is None or spec.origin is None:
        return None
    return loaded(spec.origin)


def loaded(path: str) -> ctypes.CDLL:
    """The kernels that were built as this file."""
    built = ctypes.CDLL(path)  # calls let other Python threads run
    address, number, index = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
    built.llmcad_has.argtypes = [index]
    built.llmcad_room.argtypes = built.llmcad_pack.argtypes = [index, address]
    built.llmcad_times.argtypes = built.llmcad_attend.argtypes = [index, address, address]
    built.llmcad_runs.argtypes = [address, number, number, number, address, address, number]
    built.llmcad_has.restype = built.llmcad_attend.restype = index
    built.llmcad_pack.restype = built.llmcad_times.restype = None
    built.llmcad_room.restype = built.llmcad_runs.restype = number
    return built
