"""Attention whose sums run over a row's own keys, in the order of its text, by the kernels (`attention.h`).

A row's result then has the same bits in a token tree, in a chunk of a prompt and alone. transformers' models use it
by its name: `install`.
"""

import ctypes
import functools
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from llmcad_actors.kernels import library as kernels

NAME = "llmcad"
SMALL = 1 << 18
"""Products of numbers that one thread has done before another has begun."""

KEPT_RUNS = 4

Runs = tuple[torch.Tensor, torch.Tensor]
"""What rows see: where each row's runs begin, int32 [rows + 1], and the runs of columns, int32 [runs, 2]."""

_POINTERS = ("queries", "keys", "values", "bias", "first_run", "runs", "result")
_SIZES = ("heads", "kv_heads", "rows", "columns", "width")
_STRIDES = (*(f"{what}_{part}" for what in ("query", "key", "value", "bias") for part in ("head", "row")),)


class _Attention(ctypes.Structure):
    """`struct attention` of kernels.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_long) for name in (*_SIZES, *_STRIDES)),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
    )


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    runs: Runs,
    *,
    scale: float,
    softcap: float | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """float32 query [heads, rows, width] over key and value [kv_heads, columns, width]: [rows, heads, width].

    bias: added to the scores, [heads, rows, columns].
    """
    library, (heads, rows, width), (kv_heads, columns, _) = kernels.library(), query.shape, key.shape
    assert library is not None and heads % kv_heads == 0 and key.shape == value.shape and key.shape[2] == width
    tensors = [query, key, value, *([] if bias is None else [bias])]
    assert all(each.dtype == torch.float32 and 1 in (each.stride(-1), each.shape[-1]) for each in tensors)
    result = torch.empty(rows, heads, width)
    strides = [stride for each in tensors for stride in each.stride()[:2]]
    call = _Attention(
        *(kernels.pointer(each) for each in (query, key, value, bias, *runs, result)),
        *(heads, kv_heads, rows, columns, width),
        *(*strides, *[0] * (len(_STRIDES) - len(strides))),
        *(scale, softcap or 0.0),
    )
    index = kernels.instructions.index

    def work(taken: ctypes.c_long) -> None:
        if library.llmcad_attend(index, ctypes.byref(call), ctypes.byref(taken)):
            raise MemoryError("no memory for the scores of an attention")

    kernels.on_threads(work, 1 if heads * rows * columns * width < SMALL else kernels.threads.count)
    return result


def runs_of(mask: torch.Tensor) -> Runs:
    """What an additive float32 mask [rows, columns] shows: its zeros."""
    library, (rows, columns) = kernels.library(), mask.shape
    assert library is not None and mask.dtype == torch.float32
    mask = mask if mask.stride(1) == 1 else mask.contiguous()
    first, room = torch.empty(rows + 1, dtype=torch.int32), 8 * rows
    while True:
        runs = torch.empty(room, 2, dtype=torch.int32)
        pointers = first.data_ptr(), runs.data_ptr()
        found = library.llmcad_runs(mask.data_ptr(), mask.stride(0), rows, columns, *pointers, room)
        if found <= room:
            return first, runs
        room = found


def everything(rows: int, columns: int) -> Runs:
    """Every row sees every column."""
    return torch.arange(rows + 1, dtype=torch.int32), torch.tensor([[0, columns]], dtype=torch.int32).repeat(rows, 1)


class _LastRuns:
    """Layers ask with the masks of a pass in turn: of its chunks, and of windows."""

    def __init__(self) -> None:
        self._last: deque[tuple[torch.Tensor, Runs]] = deque(maxlen=KEPT_RUNS)

    def of(self, mask: torch.Tensor) -> Runs:
        for known, runs in self._last:
            if known is mask:
                return runs
        self._last.append((mask, runs_of(mask[0, 0])))
        return self._last[-1][1]


def install(model: Any) -> None:
    """Make the transformers model `model` use `attend`, wherever it computes in float32 and has the kernels."""
    if not kernels.available():
        return
    if model._can_set_attn_implementation():
        model.set_attn_implementation(NAME)
        return
    for module in model.modules():  # Falcon's: torch's own, called by name
        if type(module).__name__.endswith("Attention"):
            module.forward = functools.partial(_forward_instead, module.forward, _Instead())


def forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers: query [1, heads, rows, width] and so on -> [1, rows, heads, width]."""
    rows, columns = query.shape[2], key.shape[2]
    causal = module.is_causal if is_causal is None else is_causal
    assert attention_mask is not None or rows == 1 or not causal
    runs = everything(rows, columns) if attention_mask is None else _last.of(attention_mask)
    result = attend(
        _dense(query[0]),
        _dense(key[0]),
        _dense(value[0]),
        runs,
        scale=query.shape[3] ** -0.5 if scaling is None else scaling,
        softcap=softcap,
        bias=None if position_bias is None else _dense(position_bias[0].expand(query.shape[1], rows, columns)),
    )
    return result[None], None


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


class _Instead(TorchFunctionMode):
    """Inside, `F.scaled_dot_product_attention` is `attend`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value = args
        runs = (
            everything(query.shape[2], key.shape[2]) if kwargs["attn_mask"] is None else _last.of(kwargs["attn_mask"])
        )
        result = attend(_dense(query[0]), _dense(key[0]), _dense(value[0]), runs, scale=query.shape[3] ** -0.5)
        return result.transpose(0, 1)[None]


def _forward_instead(forward: Callable[..., Any], mode: _Instead, *args: Any, **kwargs: Any) -> Any:
    with mode:
        return forward(*args, **kwargs)


_last = _LastRuns()
AttentionInterface.register(NAME, forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
