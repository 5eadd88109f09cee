"""The target: one streamed pass checks a whole token tree.

Rows of a pass are the committed tokens that the cache does not hold yet (the whole prompt at first, then only the
root), followed by the tree's nodes. The target knows nothing of actors; weights come from a `ShardSource`.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessorList

from llmcad_actors.core.acceptance import Choices, walk
from llmcad_actors.core.round import PassStats, Verdict
from llmcad_actors.core.tree import TokenTree
from llmcad_actors.errors import CheckpointError, LlmcadError
from llmcad_actors.families.family import Family
from llmcad_actors.families.generation_rules import active_rules
from llmcad_actors.kernels import attention, linear
from llmcad_actors.kernels.tensors import DTYPES, as_tensor
from llmcad_actors.models import chunks, vocabulary
from llmcad_actors.models.embedding import EmbeddingRows
from llmcad_actors.models.experts import joined_name, shapes_with_experts, with_experts
from llmcad_actors.models.kv_cache import TreeCache
from llmcad_actors.models.processors import PathChoices, make_processors
from llmcad_actors.models.skeleton import Slots, build_skeleton, stream_embedding, stream_layers
from llmcad_actors.models.softcap import soft_capped, softcap_of
from llmcad_actors.models.sound import SoundChoices, is_sound, not_finite
from llmcad_actors.models.stacks import stack_of
from llmcad_actors.ports import ShardSource
from llmcad_actors.storage.checkpoint import Checkpoint, TensorInfo
from llmcad_actors.storage.layout import Layout, ShardSpec
from llmcad_actors.storage.reader import read_bytes


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
        """`capacity`: rows of the cache, context plus those of the largest tree.

        `prefill_chunk`: rows that a layer runs at a time.
        """
        self.layout = layout
        self.source = source
        self.dtype = dtype
        self._checkpoint = checkpoint
        self._model = model = build_skeleton(Path(checkpoint.path), dtype)
        self._linear = linear.chosen(DTYPES[checkpoint.dtype], dtype)
        self._is_widened = self._linear is linear.widened
        if dtype == torch.float32:
            attention.install(model)
        if layout.family.encoder is not None:
            self._stream(layout.family.encoder.layers, layout.encoder, None)
        self._stream(layout.family.layers, layout.layers, None if layout.family.encoder else prefill_chunk)
        self._multiply_outside()
        self._softcap = softcap_of(model.config)
        rows = EmbeddingRows(layout.embedding, dtype)
        for embedding in embeddings_of(model, layout.family):
            stream_embedding(embedding, rows.lookup)
        self._head_bias = self._load_resident()
        self._stack = stack_of(model, checkpoint.generation_settings)
        self._cache = TreeCache(len(layout.layers), capacity)
        self._tokens: list[int] = []  # committed; the last is the root, which the cache does not hold
        self._prompt_length = 0  # of them
        self._stop: frozenset[int] = frozenset()
        self._rules = active_rules(checkpoint.generation_settings, layout.embedding.shape[0])
        self._processors = LogitsProcessorList()
        self._stall_s = 0.0

    def _stream(self, name: str, specs: Sequence[ShardSpec], chunk_rows: int | None) -> None:
        """The layers of the model's list `name` take their weights from `specs`; they run `chunk_rows` at a time."""
        layers = self._model.get_submodule(name)
        assert isinstance(layers, torch.nn.ModuleList)
        check_shapes(layers[0], self.layout, specs[0])
        converted = self.layout.family.converted
        as_stored = frozenset(n for n in linear.install(layers, self._linear) if not n.endswith(converted))
        if chunk_rows is not None:
            chunks.install(self._model.get_submodule(name.rpartition(".")[0]), layers, chunk_rows)
        stream_layers(layers, lambda index: self._layer_weights(specs[index], as_stored))

    def _multiply_outside(self) -> None:
        """Linear layers that are in no layer's list, as a few models have behind their embedding."""
        lists = tuple(f"{name}." for name in self.layout.family.layer_lists)
        outside = [module for name, module in self._model.named_modules() if not name.startswith(lists)]
        linear.install(torch.nn.ModuleList(m for m in outside if isinstance(m, torch.nn.Linear)), self._linear)

    def _load_resident(self) -> torch.Tensor | None:
        """Fill what is neither a layer nor the embedding nor the head; returns the head's bias, if there is one."""
        family = self.layout.family
        slots, bias = Slots(self._model), None
        names, filled = slots.shapes(), {family.embedding, family.head, *family.embedding_copies}
        filled |= {name for name, value in self._model.named_parameters() if not value.is_meta}  # computed
        for info in self.layout.resident:
            name = self.layout.parameter(info.name)
            filled.add(name)
            tensor = as_tensor(read_bytes(info), info.dtype, info.shape).to(self.dtype, copy=True)
            if name == (family.head_bias or family.head.replace("weight", "bias")):
                bias = tensor.flatten()
            elif name in names:
                check_shape(name, info.shape, names[name])
                slots.fill({name: tensor})
        for name in names.keys() - filled:
            if not name.startswith(tuple(f"{layers}." for layers in family.layer_lists)):
                check_shape(name, None, names[name])
        return bias

    @contextmanager
    def _layer_weights(self, spec: ShardSpec, as_stored: frozenset[str]) -> Iterator[Mapping[str, torch.Tensor]]:
        with self._leased(spec.name, spec.tensors, self.layout.leaf) as weights:
            for name in weights:
                if joined_name(self.layout.family, name) not in as_stored:
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
        text = self._stack.begin(prompt)
        shared = self._go_on_from(text)
        self._prompt_length = len(text)
        self._stop = frozenset(stop_tokens)
        max_length = self._cache.capacity if max_new_tokens is None else len(text) + max_new_tokens
        self._processors = make_processors(
            self._rules, prompt_length=len(text), max_length=max_length, stop_tokens=stop_tokens
        )
        return shared

    @torch.inference_mode()
    def verify(self, tree: TokenTree) -> Verdict:
        """One pass over the uncached committed tokens and `tree`; the accepted path is committed.

        Raises `StorageError` when a file of the checkpoint has changed since it was opened, and `CheckpointError` when
        logits that a choice depends on are not finite.
        """
        started, self._stall_s = time.perf_counter(), 0.0
        cached = self._cache.length
        pending = self._tokens[cached:]
        try:
            with self._multiplying():
                hidden = self._forward(pending, tree)
                choices = self._choices(hidden[len(pending) - 1 : len(pending) + len(tree)], tree)
                accepted = walk(tree, choices, self._stop)
            self._checkpoint.check_unchanged()  # nothing comes of a pass that read what was being written
        except BaseException as error:
            self._cache.keep(cached, ())  # the layers that did run have added rows
            if isinstance(error, LlmcadError):
                self._checkpoint.check_unchanged()  # which explains whatever else went wrong
            raise
        self._commit(tree, accepted.path, accepted.bonus, cached, len(pending))
        seconds = time.perf_counter() - started
        stats = PassStats(seconds, self._stall_s, seconds - self._stall_s, len(hidden))
        return Verdict(accepted.path, accepted.bonus, accepted.stopped, stats)

    def _go_on_from(self, text: Sequence[int]) -> int:
        """`text` is committed, and of the cache what belongs to it stays; returns so many rows."""
        shared = common_prefix(self._tokens[: self._cache.length], text[:-1])
        self._cache.keep(shared, ())
        self._tokens = list(text)
        return shared

    def forget(self) -> None:
        """Hold no row of the last text: whatever prompt comes next is computed anew."""
        self._cache.keep(0, ())

    @torch.inference_mode()
    def logits_after(self, output: Sequence[int], tokens: Sequence[int]) -> list[float]:
        """The logits of `tokens` behind the last prompt and `output`, as the choice there sees them: rules included.

        Rows of this text that the cache holds are used: behind a plain run only the last one is computed, alone, as it
        was in that run. Raises as `verify`.
        """
        text = [*self._tokens[: self._prompt_length], *output]
        cached = self._go_on_from(text)
        try:
            with self._multiplying():
                hidden = self._forward(text[cached:], TokenTree.empty())
                scores = self._logits(hidden[len(text) - 1 - cached][None]).float()
            self._checkpoint.check_unchanged()
        finally:
            self._cache.keep(cached, ())
        scores = self._processors(torch.tensor([text]), scores)
        found: list[float] = scores[0, list(tokens)].tolist()
        return found

    def _multiplying(self) -> AbstractContextManager[None]:
        """Around the products of a pass."""
        return linear.cores(self.dtype) if self._is_widened else nullcontext()

    def _forward(self, pending: list[int], tree: TokenTree) -> torch.Tensor:
        """Final hidden states [rows, hidden] of the pending tokens and the tree."""
        ids = torch.tensor([*pending, *tree.tokens.tolist()])
        root = len(self._tokens) - 1
        positions = np.concatenate([np.arange(self._cache.length, root + 1), root + tree.depths])
        keys = np.concatenate([np.arange(self._cache.length), positions])
        return self._stack.run(ids, self._mask(len(pending), tree), positions, keys, self._cache)

    def _mask(self, pending: int, tree: TokenTree) -> chunks.BuildMask:
        """Builds the mask of a pass: pending rows are causal, nodes see what is pending and their ancestors."""
        cached = self._cache.length
        ancestors = tree.ancestor_mask()

        def build(start: int, end: int) -> torch.Tensor:
            visible = np.zeros((end - start, cached + end), dtype=bool)
            visible[:, :cached] = True
            own = visible[:, cached:]
            own[:, :pending] = np.tri(end - start, min(pending, end), start, dtype=bool)
            first = max(start, pending - 1)
            if first < end:
                seen = ancestors[first - pending + 1 : end - pending + 1, : end - pending + 1]
                own[first - start :, pending - 1 :] |= seen
            mask = torch.zeros(visible.shape, dtype=self.dtype)
            return mask.masked_fill_(torch.from_numpy(~visible), torch.finfo(self.dtype).min)[None, None]

        return build

    def _choices(self, hidden: torch.Tensor, tree: TokenTree) -> Choices:
        """The target's own next token after each row of hidden states [nodes + 1, hidden]."""
        if not self._processors:
            return SoundChoices(*self._choose(hidden), self._not_finite)
        logits = self._logits(hidden)
        chosen = PathChoices(logits, self._processors, self._tokens, tree)
        return SoundChoices(chosen, is_sound(logits.max(dim=-1).values), self._not_finite)

    def _not_finite(self) -> CheckpointError:
        return not_finite("target", self._checkpoint.path, self.dtype)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Whole rows of logits [rows, vocab] in the computing type."""
        logits = torch.empty(len(hidden), self.layout.embedding.shape[0], dtype=self.dtype)
        for spec in self.layout.head:
            with self._leased(spec.name, spec.tensors) as tensors:
                for start, part in self._parts_of_logits(hidden, spec, tensors):
                    logits[:, start : start + part.shape[1]] = part
        return logits

    def _choose(self, hidden: torch.Tensor) -> tuple[np.ndarray, torch.Tensor]:
        """The target's own next token after each row, int64 [rows], ties to the lowest id; and which rows are sound."""
        best = torch.full((len(hidden),), -torch.inf)
        choice = torch.zeros(len(hidden), dtype=torch.int64)
        for spec in self.layout.head:
            with self._leased(spec.name, spec.tensors) as tensors:
                for start, part in self._parts_of_logits(hidden, spec, tensors):
                    value, index = part.float().max(dim=-1)
                    better = (value > best) | value.isnan()  # once it is no number it stays so
                    best[better], choice[better] = value[better], index[better] + start
        return choice.numpy(), is_sound(best)

    def _parts_of_logits(
        self, hidden: torch.Tensor, spec: ShardSpec, tensors: Mapping[str, torch.Tensor]
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """(first id, logits [rows, part of the vocabulary]) of one shard of the head, part by part."""
        weight, row = tensors[spec.tensors[0].name], spec.row_start
        for start, end in vocabulary.parts(len(hidden), len(weight)):
            bias = None if self._head_bias is None else self._head_bias[row + start : row + end]
            yield row + start, soft_capped(self._linear(hidden, weight[start:end], bias), self._softcap)

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


def embeddings_of(model: Any, family: Family) -> list[torch.nn.Embedding]:
    """The modules that turn token ids into rows: the model's, or the encoder's and the decoder's."""
    base = model.base_model
    if family.encoder is None:
        return [base.get_input_embeddings()]
    return [base.encoder.get_input_embeddings(), base.decoder.get_input_embeddings()]


def check_shapes(layer: torch.nn.Module, layout: Layout, spec: ShardSpec) -> None:
    """The checkpoint's first layer, `spec`, has exactly the parameters that the architecture's layer has."""
    expected = Slots(layer).shapes()
    stored = {layout.leaf(info.name): info.shape for info in spec.tensors}
    found = shapes_with_experts(layout.family, stored)
    for name in sorted(expected.keys() | found.keys()):
        check_shape(f"{spec.name.replace('.', ' ')}: {name}", found.get(name), expected.get(name))


def check_shape(name: str, found: tuple[int, ...] | None, expected: tuple[int, ...] | None) -> None:
    """Raises CheckpointError unless the checkpoint has what the architecture has."""
    if found != expected:
        raise CheckpointError(
            f"{name} is {found or 'missing'} in the checkpoint, the architecture has {expected or 'no such tensor'}; "
            "config.json and the weights do not belong together"
        )
