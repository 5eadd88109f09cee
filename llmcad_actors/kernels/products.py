"""Products of float32 rows with weights as they are stored, by the package's own kernels (`products.h`)."""

import ctypes

import torch

from llmcad_actors.kernels import library as kernels

KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}  # as in kernels.h
STEP = 64
"""Results of other widths have gaps between their rows. torch's functions of single numbers run through dense rows as
through one line, and compute the last few numbers in another way; of rows with gaps, so they do in each row alike."""

SMALL = 1 << 20
"""Products of numbers that one thread has done before another has begun."""


class _Product(ctypes.Structure):
    """`struct product` of kernels.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("rows", "weights", "packed", "result")),
        *((name, ctypes.c_long) for name in ("count", "outputs", "depth", "stride", "kind")),
    )


def times(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """float32 rows [rows, in] times the transpose of bf16, f16 or float32 weight [out, in], contiguous: [rows, out].

    A row's result has the same bits whatever rows stand beside it.
    """
    library, (count, depth), outputs = kernels.library(), rows.shape, weight.shape[0]
    assert library is not None and rows.dtype == torch.float32 and weight.dtype in KINDS
    assert weight.is_contiguous() and rows.is_contiguous() and weight.shape[1] == depth
    stride = outputs if outputs % STEP == 0 else (outputs // STEP + 1) * STEP
    result = torch.empty(count, stride)[:, :outputs]
    pointers = rows.data_ptr(), weight.data_ptr(), None, result.data_ptr()
    product = _Product(*pointers, count, outputs, depth, stride, KINDS[weight.dtype])
    index = kernels.instructions.index
    packed = torch.empty(library.llmcad_room(index, ctypes.byref(product)))
    if len(packed):
        product.packed = packed.data_ptr()
        library.llmcad_pack(index, ctypes.byref(product))
    kernels.on_threads(
        lambda taken: library.llmcad_times(index, ctypes.byref(product), ctypes.byref(taken)),
        1 if count * outputs * depth < SMALL else kernels.threads.count,
    )
    return result
