"""The product that bfloat16 passes use on CPUs without bfloat16 instructions: `half_weights.c`, if it was built.

Its sums for one row are not formed as those for many, which bfloat16 would not show. Float32 passes use `products.py`.

Its threads share the outputs as they come: one that is held up by another program holds up nobody.
"""

import ctypes
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.machinery import PathFinder

import torch

import llmcad_actors.kernels
from llmcad_actors.kernels.library import threads
from llmcad_actors.machine.processor import has_vectors

PANEL, STRIDE = 16, 16  # as in half_weights.c
KINDS = {torch.bfloat16: 0, torch.float16: 1}
POINTER, LONG = ctypes.c_void_p, ctypes.c_long


@cache
def available() -> bool:
    """Whether the kernel was built for this machine; else torch has to do."""
    return has_vectors() and _library() is not None


def times(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """float32 rows [rows, in] times the transpose of bf16 or f16 weight [out, in], both contiguous: [rows, out]."""
    library, (count, depth), outputs = _library(), rows.shape, weight.shape[0]
    assert library is not None and weight.is_contiguous() and rows.is_contiguous()
    packed = torch.empty(-(-count // PANEL), depth, PANEL)
    library.llmcad_pack(rows.data_ptr(), packed.data_ptr(), count, depth)
    result, taken = torch.empty(count, outputs), ctypes.c_long(0)

    def work() -> None:
        pointers = packed.data_ptr(), weight.data_ptr(), result.data_ptr()
        library.llmcad_times(*pointers, count, outputs, depth, KINDS[weight.dtype], ctypes.byref(taken))

    _on_all_threads(work)
    return result


def row_times(row: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """float32 row [in] times the transpose of bf16 weight [out, in], both contiguous: [out].

    Bound by memory, of which one thread can use most: it leaves a core to who reads the next weights.
    """
    library, (outputs, depth) = _library(), weight.shape
    assert library is not None and weight.dtype == torch.bfloat16 and weight.is_contiguous()
    whole = depth // STRIDE * STRIDE
    split = torch.cat([row[:whole].view(-1, STRIDE // 2, 2).transpose(1, 2).reshape(-1), row[whole:]])
    result, taken = torch.empty(outputs), ctypes.c_long(0)

    def work() -> None:
        pointers = split.data_ptr(), weight.data_ptr(), result.data_ptr()
        library.llmcad_row(*pointers, outputs, depth, ctypes.byref(taken))

    _on_all_threads(work, left=1)
    return result


def _on_all_threads(work: Callable[[], None], left: int = 0) -> None:
    """Run `work` here and in all other threads but `left`; one that has not begun when this one ends is not needed."""
    others = max(threads.count - 1 - left, 0)
    started = [_pool(others, threading.get_ident()).submit(work) for _ in range(others)]
    work()
    for other in started:
        if not other.cancel():
            other.result()


@cache
def _pool(count: int, caller: int) -> ThreadPoolExecutor:
    """Of each caller's own: threads take their scheduling from the one that starts them."""
    return ThreadPoolExecutor(count, thread_name_prefix="half-weights")


@cache
def _library() -> ctypes.CDLL | None:
    spec = PathFinder.find_spec("llmcad_actors.kernels.native_half_weights", llmcad_actors.kernels.__path__)
    if spec is None or spec.origin is None:
        return None
    library = ctypes.CDLL(spec.origin)  # calls let other Python threads run
    library.llmcad_pack.argtypes = [POINTER, POINTER, LONG, LONG]
    library.llmcad_times.argtypes = [POINTER, POINTER, POINTER, LONG, LONG, LONG, ctypes.c_int, POINTER]
    library.llmcad_row.argtypes = [POINTER, POINTER, POINTER, LONG, LONG, POINTER]
    library.llmcad_pack.restype = library.llmcad_times.restype = library.llmcad_row.restype = None
    return library
