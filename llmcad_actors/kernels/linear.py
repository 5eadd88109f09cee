"""Linear layers in float32 around weights as they are stored.

The package's own kernels multiply (`products.py`): a row's result has the same bits whatever rows stand beside it.
Where they could not be built, torch does: the weights are widened to float32 block by block, each block small enough
to stay in the processor's cache. Sums are formed in float32 and rounded once to the type of the rows: so it is also
done in bfloat16 on CPUs without instructions for that, where torch's emulation is several times slower.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from llmcad_actors.kernels import library as kernels
from llmcad_actors.kernels import products
from llmcad_actors.machine.processor import has_bfloat16

BLOCK_BYTES = 4 << 20
"""Of widened weights: few enough to stay in the last cache, enough to keep two cores busy."""

Linear = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""rows [..., in], weight [out, in] as stored, bias [out] or None -> [..., out] in the type of `rows`."""


def chosen(stored: torch.dtype, dtype: torch.dtype) -> Linear:
    """How to multiply rows in `dtype` with weights in `stored` on this machine."""
    if dtype == torch.float32 and (kernels.available() or stored != dtype):
        return widened
    if stored == dtype:
        return widened if widening_pays(dtype) else F.linear
    return widened if widening_pays(dtype) else converted


def converted(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear` after the weight has been brought to the type of `rows`."""
    return F.linear(rows, weight.to(rows.dtype), bias)


class _Widened:
    """`F.linear` in float32, rounded once to the type of `rows`."""

    def __init__(self) -> None:
        self._block = torch.empty(0)

    def __call__(self, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        flat = rows.reshape(-1, rows.shape[-1])
        product = products.times if _has_kernel(weight) else None
        if rows.dtype == weight.dtype and product is None and (len(flat) == 1 or rows.dtype == torch.float32):
            return F.linear(rows, weight, bias)  # for one row torch has a kernel of its own too
        wide = (product or self._by_blocks)(flat.float().contiguous(), weight)
        if bias is not None:
            wide += bias
        return wide.to(rows.dtype).view(*rows.shape[:-1], weight.shape[0])

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


def _has_kernel(weight: torch.Tensor) -> bool:
    """Whether the package's own product is built, and for such weights."""
    return kernels.available() and weight.dtype in products.KINDS and weight.is_contiguous()


def widening_pays(dtype: torch.dtype) -> bool:
    """Whether `widened` beats torch's own for `dtype` on this machine."""
    return dtype == torch.bfloat16 and not has_bfloat16()


@contextmanager
def cores(dtype: torch.dtype) -> Iterator[None]:
    """Around a pass in `dtype` whose matrices are all multiplied by `widened`.

    OpenMP's threads would spin between products. And oneDNN has a GELU of its own, for dense rows only: in float32, not
    the bits that other rows get.
    """
    if not kernels.available():
        yield
        return
    was_enabled = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = was_enabled and dtype != torch.float32  # type: ignore[assignment]
    try:
        with kernels.threads.taken():
            yield
    finally:
        torch.backends.mkldnn.enabled = was_enabled


def install(model: nn.Module, how: Linear) -> frozenset[str]:
    """Make the matrices of every module in the list `model` be multiplied by `how`.

    Returns their names inside such a module: those may stay as they are stored.
    """
    names = set()
    for layer in model.children():
        for name, module in layer.named_modules():
            matrices = [leaf for leaf, value in module._parameters.items() if value is not None and value.ndim > 1]
            forward = _forward_of(module, how) if matrices else None
            if forward is not None:
                module.forward = forward
                names |= {f"{name}.{leaf}" if name else leaf for leaf in matrices}
    return frozenset(names)


def _forward_of(module: nn.Module, how: Linear) -> Callable[..., Any] | None:
    """The forward of a module with matrices, multiplied by `how`; None: it stays as it is."""
    if isinstance(module, nn.Linear):
        return functools.partial(_forward, module, how)
    if how is F.linear or isinstance(module, nn.Embedding):
        return None
    if isinstance(module, Conv1D):
        return functools.partial(_forward_turned, module, how)
    return functools.partial(_forward_instead, module.forward, _Instead(how))


def _forward(module: nn.Linear, how: Linear, rows: torch.Tensor) -> torch.Tensor:
    return how(rows, module.weight, module.bias)


def _forward_turned(module: Any, how: Linear, rows: torch.Tensor) -> torch.Tensor:
    """GPT-2's: its weight is [in, out]."""
    return how(rows, module.weight.t().contiguous(), module.bias)


class _Instead(TorchFunctionMode):
    """Inside, `F.linear` multiplies by `how`: for modules with matrices of their own, routers and experts."""

    def __init__(self, how: Linear) -> None:
        super().__init__()
        self._how = how

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (self._how if func is F.linear else func)(*args, **(kwargs or {}))


def _forward_instead(forward: Callable[..., Any], mode: _Instead, *args: Any, **kwargs: Any) -> Any:
    with mode:
        return forward(*args, **kwargs)
