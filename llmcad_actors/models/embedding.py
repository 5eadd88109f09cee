"""The target's token embedding, never loaded whole: the rows a pass needs are read from their byte ranges."""

import numpy as np
import torch

from llmcad_actors.core.budget import EMBEDDING_CACHE_BYTES
from llmcad_actors.kernels.tensors import as_tensor
from llmcad_actors.storage.checkpoint import TensorInfo
from llmcad_actors.storage.reader import EmbeddingReader


class EmbeddingRows:
    """Rows by token id, with the most recently used ones (8 MiB) kept."""

    def __init__(self, info: TensorInfo, dtype: torch.dtype) -> None:
        self._info = info
        self._dtype = dtype
        self._reader = EmbeddingReader(info)
        self._row_bytes = info.nbytes // info.shape[0]
        self._kept: dict[int, np.ndarray] = {}

    def lookup(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A small table [distinct, hidden] and `ids` as indices into it."""
        distinct, local = torch.unique(ids, return_inverse=True)
        wanted = distinct.tolist()
        missing = [token for token in wanted if token not in self._kept]
        if missing:
            self._kept.update(zip(missing, self._reader.read_rows(missing), strict=True))
        for token in wanted:  # most recently used last
            self._kept[token] = self._kept.pop(token)
        table = np.stack([self._kept[token] for token in wanted])
        self._forget()
        tensor = as_tensor(table, self._info.dtype, (len(wanted), *self._info.shape[1:]))
        return tensor.to(self._dtype, copy=True), local

    def _forget(self) -> None:
        while len(self._kept) * self._row_bytes > EMBEDDING_CACHE_BYTES:
            del self._kept[next(iter(self._kept))]
