"""Bytes as torch tensors, without copies."""

import ctypes

import numpy as np
import torch

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
"""safetensors' names of the stored types that can be computed with."""


def as_tensor(data: np.ndarray, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """`data` (uint8, contiguous, perhaps read-only) seen as a tensor of the stored `dtype` and `shape`.

    The tensor keeps `data` alive, and must not be written. (Through ctypes because `torch.from_numpy` warns about
    read-only arrays, and arrays in the object store are read-only.)
    """
    if data.nbytes == 0:
        return torch.empty(shape, dtype=DTYPES[dtype])
    memory = (ctypes.c_uint8 * data.nbytes).from_address(data.ctypes.data)
    memory.owner = data  # type: ignore[attr-defined]
    return torch.frombuffer(memory, dtype=DTYPES[dtype]).view(shape)


def computing(name: str) -> torch.dtype:
    """The type that a spec names to compute in: "float32" or "bfloat16"."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
