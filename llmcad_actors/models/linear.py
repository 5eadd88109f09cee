"""Linear layers on CPUs without bfloat16 instructions.

There, torch multiplies bfloat16 matrices through an emulation that is several times slower than float32. So the
weights are widened to float32 block by block, each block small enough to stay in the processor's cache, and
multiplied there: by the package's own kernel (`half_weights.py`), or by torch where that could not be built. Sums are
formed in float32 and rounded once, as by bfloat16 instructions.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import nn

from llmcad_actors.models import half_weights
from llmcad_actors.processor import has_bfloat16

BLOCK_BYTES = 4 << 20
"""Of widened weights: few enough to stay in the last cache, enough to keep two cores busy."""

Linear = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""rows [..., in], weight [out, in] as stored, bias [out] or None -> [..., out] in the type of `rows`."""


def chosen(stored: torch.dtype, dtype: torch.dtype) -> Linear:
    """How to multiply rows in `dtype` with weights in `stored` on this machine."""
    if stored == dtype:
        return widened if widening_pays(dtype) else F.linear
    return widened if dtype == torch.float32 or widening_pays(dtype) else converted


def converted(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear` after the weight has been brought to the type of `rows`."""
    return F.linear(rows, weight.to(rows.dtype), bias)


class _Widened:
    """`F.linear` in float32, rounded once to the type of `rows`."""

    def __init__(self) -> None:
        self._block = torch.empty(0)

    def __call__(self, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if rows.dtype == weight.dtype == torch.float32:
            return F.linear(rows, weight, bias)
        flat = rows.reshape(-1, rows.shape[-1])
        has_kernel = half_weights.available() and weight.dtype in half_weights.KINDS and weight.is_contiguous()
        if len(flat) == 1 and rows.dtype == weight.dtype and not (has_kernel and weight.dtype == torch.bfloat16):
            return F.linear(rows, weight, bias)  # for one row torch has a kernel of its own too
        wide = self._product(flat.float().contiguous(), weight, has_kernel)
        result = wide if bias is None else wide + bias
        return result.to(rows.dtype).view(*rows.shape[:-1], weight.shape[0])

    def _product(self, flat: torch.Tensor, weight: torch.Tensor, has_kernel: bool) -> torch.Tensor:
        if not has_kernel:
            return self._by_blocks(flat, weight)
        if len(flat) == 1 and weight.dtype == torch.bfloat16:
            return half_weights.row_times(flat[0], weight)
        return half_weights.times(flat, weight)

    def _by_blocks(self, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """float32 rows [rows, in] -> [rows, out]. Keeps its block: fresh memory costs more than sums."""
        columns, wide = rows.t(), torch.empty(weight.shape[0], len(rows))
        step = min(weight.shape[0], max(1, BLOCK_BYTES // (4 * weight.shape[1])))
        block = self._take(step, weight.shape[1])
        for start in range(0, weight.shape[0], step):
            narrow = weight[start : start + step]
            torch.mm(block[: len(narrow)].copy_(narrow), columns, out=wide[start : start + step])
        return wide.t().contiguous()

    def _take(self, rows: int, columns: int) -> torch.Tensor:
        if self._block.numel() < rows * columns:
            with torch.inference_mode(mode=False):  # for use inside and outside of it
                self._block = torch.empty(rows * columns)
        return self._block[: rows * columns].view(rows, columns)


widened = _Widened()
"""One thread at a time."""


def widening_pays(dtype: torch.dtype) -> bool:
    """Whether `widened` beats torch's own for `dtype` on this machine."""
    return dtype == torch.bfloat16 and not has_bfloat16()


def cores() -> AbstractContextManager[None]:
    """Around a pass whose matrices are all multiplied by `widened`: OpenMP's threads would spin between products."""
    return half_weights.threads.taken() if half_weights.available() else nullcontext()


def install(model: nn.Module, how: Linear) -> frozenset[str]:
    """Make the linear layers of every module in the list `model` multiply by `how`.

    Returns the names of their weights inside such a module: those may stay as they are stored.
    """
    names = set()
    for layer in model.children():
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear):
                module.forward = functools.partial(_forward, module, how)  # type: ignore[method-assign]
                names.add(f"{name}.weight")
    return frozenset(names)


def _forward(module: nn.Linear, how: Linear, rows: torch.Tensor) -> torch.Tensor:
    return how(rows, module.weight, module.bias)
