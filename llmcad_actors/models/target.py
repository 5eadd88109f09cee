"""The target: one streamed pass checks a whole token tree.

Rows of a pass are the committed tokens that the cache does not hold yet (the whole prompt at first, then only the
root), followed by the tree's nodes, padded to a few fixed sizes. The target knows nothing of actors; weights come
from a `ShardSource`.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import LogitsProcessorList

from llmcad_actors.core.acceptance import Choices, walk
from llmcad_actors.core.tree import TokenTree
from llmcad_actors.errors import CheckpointError
from llmcad_actors.messages import PassStats, Verdict
from llmcad_actors.models import chunks, linear
from llmcad_actors.models.embedding import EmbeddingRows
from llmcad_actors.models.experts import shapes_with_experts, with_experts
from llmcad_actors.models.generation_rules import active_rules
from llmcad_actors.models.kv_cache import TreeCache
from llmcad_actors.models.masks import Windows
from llmcad_actors.models.processors import PathChoices, make_processors
from llmcad_actors.models.skeleton import Slots, build_skeleton, stream_layers
from llmcad_actors.models.softcap import soft_capped, softcap_of
from llmcad_actors.models.tensors import DTYPES, as_tensor
from llmcad_actors.ports import ShardSource
from llmcad_actors.storage.checkpoint import Checkpoint, TensorInfo
from llmcad_actors.storage.layout import Layout, ShardSpec
from llmcad_actors.storage.reader import read_bytes

ROW_SIZES = (1, 16, 32, 64, 96, 144, 192, 256, 320, 384, 512)


def padded_rows(rows: int) -> int:
    """The number of rows a pass really runs: few sizes, so that the same matmul kernels run whatever the tree."""
    for size in ROW_SIZES:
        if rows <= size:
            return size
    return -(-rows // 256) * 256


class Target:
    """A checkpoint's model, its key/value cache, and the committed tokens it has seen."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        layout: Layout,
        source: ShardSource,
        *,
        dtype: torch.dtype,
        capacity: int,
        prefill_chunk: int = 256,
    ) -> None:
        """`capacity`: rows of the cache, context plus the padded rows of the largest pass.

        `prefill_chunk`: rows that a layer runs at a time.
        """
        self.layout = layout
        self.source = source
        self.dtype = dtype
        self._model = model = build_skeleton(Path(checkpoint.path), dtype)
        self._base = cast(Any, model.base_model)
        layers = model.get_submodule(layout.family.layers)
        assert isinstance(layers, torch.nn.ModuleList)
        check_shapes(layers[0], layout)
        self._linear = linear.chosen(DTYPES[checkpoint.dtype], dtype)
        self._as_stored = linear.install(layers, self._linear)
        chunks.install(model.get_submodule(layout.family.layers.rpartition(".")[0]), layers, prefill_chunk)
        stream_layers(layers, self._layer_weights)
        self._windows, self._softcap = Windows.of(model.config), softcap_of(model.config)
        self._embedding = self._base.get_input_embeddings()
        self._embedding.padding_idx = None  # ids are local to a pass
        self._embedding_slots = Slots(self._embedding)
        self._rows = EmbeddingRows(layout.embedding, dtype)
        self._head_bias = self._load_resident()
        self._cache = TreeCache(len(layers), capacity)
        self._tokens: list[int] = []  # committed; the last is the root, which the cache does not hold
        self._stop: frozenset[int] = frozenset()
        self._rules = active_rules(checkpoint.generation_settings, layout.embedding.shape[0])
        self._processors = LogitsProcessorList()
        self._stall_s = 0.0

    def _load_resident(self) -> torch.Tensor | None:
        """Fill what is neither a layer nor the embedding nor the head; returns the head's bias, if there is one."""
        slots, bias = Slots(self._model), None
        names, filled = slots.shapes(), {self.layout.family.embedding, self.layout.family.head}
        for info in self.layout.resident:
            name = self.layout.parameter(info.name)
            filled.add(name)
            tensor = as_tensor(read_bytes(info), info.dtype, info.shape).to(self.dtype, copy=True)
            if name == self.layout.family.head.replace("weight", "bias"):
                bias = tensor
            elif name in names:
                check_shape(name, info.shape, names[name])
                slots.fill({name: tensor})
        for name in names.keys() - filled:
            if not name.startswith(f"{self.layout.family.layers}."):
                check_shape(name, None, names[name])
        return bias

    @contextmanager
    def _layer_weights(self, index: int) -> Iterator[Mapping[str, torch.Tensor]]:
        spec = self.layout.layers[index]
        with self._leased(spec.name, spec.tensors, self.layout.leaf) as weights:
            for name in weights.keys() - self._as_stored:
                weights[name] = weights[name].to(self.dtype)
            yield with_experts(self.layout.family, weights)

    @contextmanager
    def _leased(
        self, name: str, infos: Sequence[TensorInfo], key: Callable[[str], str] = str
    ) -> Iterator[dict[str, torch.Tensor]]:
        """The shard's tensors as stored, by `key` of their names; none may outlive the block."""
        started = time.perf_counter()
        with self.source.lease(name) as arrays:
            self._stall_s += time.perf_counter() - started
            tensors = {key(i.name): as_tensor(arrays[i.name], i.dtype, i.shape) for i in infos}
            try:
                yield tensors
            finally:
                tensors.clear()  # before the lease ends: the loader counts its bytes as free from then on

    def begin(self, prompt: Sequence[int], stop_tokens: Sequence[int], max_new_tokens: int | None = None) -> int:
        """Start on a prompt; returns how many of its tokens the cache holds already (a shared prefix).

        max_new_tokens: where a forced last token would stand; None: as many as the cache holds.
        """
        held = self._tokens[: self._cache.length]
        shared = common_prefix(held, prompt[:-1])
        self._cache.keep(shared, ())
        self._tokens = list(prompt)
        self._stop = frozenset(stop_tokens)
        max_length = self._cache.capacity if max_new_tokens is None else len(prompt) + max_new_tokens
        self._processors = make_processors(
            self._rules, prompt_length=len(prompt), max_length=max_length, stop_tokens=stop_tokens
        )
        return shared

    @torch.inference_mode()
    def verify(self, tree: TokenTree) -> Verdict:
        """One pass over the uncached committed tokens and `tree`; the accepted path is committed."""
        started, self._stall_s = time.perf_counter(), 0.0
        cached = self._cache.length
        pending = self._tokens[cached:]
        try:
            hidden, rows = self._forward(pending, tree)
            choices = self._choices(hidden[len(pending) - 1 : len(pending) + len(tree)], tree)
            accepted = walk(tree, choices, self._stop)
        except BaseException:
            self._cache.keep(cached, ())  # the layers that did run have added rows
            raise
        self._commit(tree, accepted.path, accepted.bonus, cached, len(pending))
        seconds = time.perf_counter() - started
        stats = PassStats(seconds, self._stall_s, seconds - self._stall_s, rows)
        return Verdict(accepted.path, accepted.bonus, accepted.stopped, stats)

    def _forward(self, pending: list[int], tree: TokenTree) -> tuple[torch.Tensor, int]:
        """Final hidden states [rows, hidden] of the pending tokens and the tree."""
        used = len(pending) + len(tree)
        padding = max(0, min(padded_rows(used), self._cache.capacity - self._cache.length) - used)
        ids = torch.tensor([*pending, *tree.tokens.tolist(), *[0] * padding])
        root = len(self._tokens) - 1
        positions = np.concatenate(
            [np.arange(self._cache.length, root + 1), root + tree.depths, np.full(padding, root)]
        )
        weights, local = self._rows.lookup(ids)
        with self._embedding_slots.borrowed({"weight": weights}):
            output = self._base(
                input_ids=local[None],
                attention_mask=self._windows.chunked(
                    self._mask(len(pending), tree, padding),
                    positions,
                    np.concatenate([np.arange(self._cache.length), positions]),
                ),
                position_ids=torch.from_numpy(positions)[None],
                past_key_values=self._cache,
                use_cache=True,
            )
        return output.last_hidden_state[0], used + padding

    def _mask(self, pending: int, tree: TokenTree, padding: int) -> chunks.BuildMask:
        """Builds the mask of a pass: pending rows are causal, nodes see what is pending and their ancestors."""
        cached, used = self._cache.length, pending + len(tree)
        ancestors = tree.ancestor_mask()

        def build(start: int, end: int) -> torch.Tensor:
            visible = np.zeros((end - start, cached + end), dtype=bool)
            visible[:, :cached] = True
            own, row = visible[:, cached:], np.arange(start, end)
            own[row < used, :pending] = True
            own &= np.tri(end - start, end, start, dtype=bool)
            first, last = max(start, pending - 1), min(end, used)
            if first < last:
                seen = ancestors[first - pending + 1 : last - pending + 1, : last - pending + 1]
                own[first - start : last - start, pending - 1 : last] |= seen
            own[row - start, row] = True
            mask = torch.zeros(visible.shape, dtype=self.dtype)
            return mask.masked_fill_(torch.from_numpy(~visible), torch.finfo(self.dtype).min)[None, None]

        return build

    def _choices(self, hidden: torch.Tensor, tree: TokenTree) -> Choices:
        """The target's own next token after each row of hidden states [nodes + 1, hidden]."""
        if not self._processors:
            return self._choose(hidden)
        return PathChoices(self._logits(hidden), self._processors, self._tokens, tree)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Whole rows of logits [rows, vocab] in the computing type."""
        logits = torch.empty(len(hidden), self.layout.embedding.shape[0], dtype=self.dtype)
        for spec in self.layout.head:
            with self._leased(spec.name, spec.tensors) as tensors:
                part = self._part_of_logits(hidden, spec, tensors)
                logits[:, spec.row_start : spec.row_start + part.shape[1]] = part
        return logits

    def _choose(self, hidden: torch.Tensor) -> np.ndarray:
        """The target's own next token after each row, int64 [rows]; ties go to the lowest id."""
        best = torch.full((len(hidden),), -torch.inf)
        choice = torch.zeros(len(hidden), dtype=torch.int64)
        for spec in self.layout.head:
            with self._leased(spec.name, spec.tensors) as tensors:
                value, index = self._part_of_logits(hidden, spec, tensors).float().max(dim=-1)
            better = value > best
            best[better], choice[better] = value[better], index[better] + spec.row_start
        return choice.numpy()

    def _part_of_logits(
        self, hidden: torch.Tensor, spec: ShardSpec, tensors: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """Logits [rows, vocabulary slice] of one shard of the head."""
        weight = tensors[spec.tensors[0].name]
        bias = None if self._head_bias is None else self._head_bias[spec.row_start : spec.row_start + len(weight)]
        return soft_capped(self._linear(hidden, weight, bias), self._softcap)

    def _commit(self, tree: TokenTree, path: Sequence[int], bonus: int, cached: int, pending: int) -> None:
        first_node = cached + pending
        self._cache.keep(first_node, [first_node + node for node in path])
        self._tokens += [int(tree.tokens[node]) for node in path] + [bonus]


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """How many leading tokens two sequences share."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))


def check_shapes(layer: torch.nn.Module, layout: Layout) -> None:
    """The checkpoint's first layer has exactly the parameters that the architecture's layer has."""
    expected = Slots(layer).shapes()
    stored = {layout.leaf(info.name): info.shape for info in layout.layers[0].tensors}
    found = shapes_with_experts(layout.family, stored)
    for name in sorted(expected.keys() | found.keys()):
        check_shape(f"layer 0: {name}", found.get(name), expected.get(name))


def check_shape(name: str, found: tuple[int, ...] | None, expected: tuple[int, ...] | None) -> None:
    """Raises CheckpointError unless the checkpoint has what the architecture has."""
    if found != expected:
        raise CheckpointError(
            f"{name} is {found or 'missing'} in the checkpoint, the architecture has {expected or 'no such tensor'}; "
            "config.json and the weights do not belong together"
        )
