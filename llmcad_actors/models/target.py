"""The target: one streamed pass checks the token trees of all running requests.

Rows of a pass are, for each request, the committed tokens that the cache does not hold yet (its prompt at first, then
only the root), followed by its tree's nodes. The target knows nothing of actors; weights come from a `ShardSource`.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessorList

from llmcad_actors.core.acceptance import Choices, walk
from llmcad_actors.core.choosing import Noise, TokenLogprobs
from llmcad_actors.core.request import Request
from llmcad_actors.core.round import Check, PassReport, PassStats, Verdict
from llmcad_actors.core.tree import TokenTree
from llmcad_actors.errors import CheckpointError, EngineBusyError, LlmcadError
from llmcad_actors.families.family import Family
from llmcad_actors.families.generation_rules import active_rules
from llmcad_actors.kernels import attention, linear
from llmcad_actors.kernels.tensors import DTYPES, as_tensor
from llmcad_actors.models import chunks, vocabulary
from llmcad_actors.models.embedding import EmbeddingRows
from llmcad_actors.models.experts import joined_name, shapes_with_experts, with_experts
from llmcad_actors.models.kv_arena import Arena, Block, Shelf
from llmcad_actors.models.processors import PathChoices, logprobs_of, make_processors
from llmcad_actors.models.skeleton import Slots, build_skeleton, stream_embedding, stream_layers
from llmcad_actors.models.softcap import soft_capped, softcap_of
from llmcad_actors.models.sound import SoundChoices, is_sound, not_finite
from llmcad_actors.models.stacks import stack_of
from llmcad_actors.ports import ShardSource
from llmcad_actors.storage.checkpoint import Checkpoint, TensorInfo
from llmcad_actors.storage.layout import Layout, ShardSpec
from llmcad_actors.storage.reader import read_bytes


@dataclass(eq=False)
class Text:
    """A request's text, as far as the target has said it, and where its rows are."""

    request: Request
    tokens: list[int]  # committed; the last is the root, which the cache does not hold
    block: Block  # of the rows
    cached: int  # rows that hold tokens
    processors: LogitsProcessorList
    noise: Noise | None

    @property
    def needs_whole_rows(self) -> bool:
        return bool(self.processors) or self.request.choosing.needs_whole_rows


@dataclass(frozen=True, eq=False)
class Part:
    """A request's share of a pass."""

    number: int
    text: Text
    tree: TokenTree
    first: int  # of the pass's rows
    pending: int  # committed tokens that it runs
    scratch: int  # the arena's row of its first node

    @property
    def has_root(self) -> bool:
        """The prompt is run to its end, so there is something to choose."""
        return self.text.cached + self.pending == len(self.text.tokens)

    @property
    def rows(self) -> int:
        return self.pending + len(self.tree)

    @property
    def chooses(self) -> range:
        """The pass's rows, root and nodes, after which a token is chosen."""
        return range(self.first + self.pending - 1, self.first + self.rows) if self.has_root else range(0)

    @property
    def places(self) -> np.ndarray:
        """int64[rows]: where in the arena."""
        start = self.text.block.start + self.text.cached
        return np.concatenate(
            [np.arange(start, start + self.pending), np.arange(self.scratch, self.scratch + len(self.tree))]
        )

    @property
    def positions(self) -> np.ndarray:
        """int64[rows]: in the text."""
        cached, root = self.text.cached, len(self.text.tokens) - 1
        return np.concatenate([np.arange(cached, cached + self.pending), root + self.tree.depths])

    def show(self, visible: np.ndarray, start: int, end: int, ancestors: np.ndarray) -> None:
        """Write into bool `visible` [end - start, columns] what the part's rows among start ... end see."""
        rows = np.arange(max(start, self.first), min(end, self.first + self.rows))
        if not len(rows):
            return
        begin, own, at = self.text.block.start, rows - self.first, rows - start
        last = np.minimum(own + 1, self.pending) + self.text.cached  # a prompt's tokens are causal
        columns = np.arange(self.text.cached + self.pending)
        visible[at[0] : at[-1] + 1, begin : begin + len(columns)] = columns < last[:, None]
        if (nodes := own >= self.pending).any():
            seen = ancestors[own[nodes] - self.pending + 1, 1:]
            visible[at[nodes], self.scratch : self.scratch + len(self.tree)] = seen


class Target:
    """A checkpoint's model, its key/value cache, and the texts that it goes on with."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        layout: Layout,
        source: ShardSource,
        *,
        dtype: torch.dtype,
        capacity: int,
        max_nodes: int = 128,
        prefill_chunk: int = 256,
    ) -> None:
        """`capacity`: rows of the cache for texts, of all requests together. max_nodes: of a pass's trees together.

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
        self._arena = Arena(len(layout.layers), capacity, max_nodes)
        self._max_nodes = max_nodes
        self._shelf = Shelf[Text](self._arena)
        self._rules = active_rules(checkpoint.generation_settings, layout.embedding.shape[0])
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

    @property
    def num_rows(self) -> int:
        """Rows of the cache that running requests hold."""
        return sum(text.block.size for text in self._shelf.texts.values())

    def begin(self, number: int, request: Request) -> int:
        """Go on from a prompt; returns how many of its tokens the cache holds, of this or that text that begins so.

        Raises ValueError where the cache has no room.
        """
        self._check_alone()
        return self._begin(number, request, self._stack.begin(request.prompt)).cached

    def _check_alone(self) -> None:
        """An encoder's states are of one prompt."""
        if self.layout.family.encoder is not None and self._shelf.texts:
            raise ValueError("an encoder-decoder model runs one request at a time")

    def end(self, number: int) -> None:
        """The request needs its rows no more. One that is not known has ended already."""
        self._shelf.end(number)

    def forget(self) -> None:
        """Hold no row of a text that has ended: whatever prompt comes next is computed anew."""
        self._shelf.forget()

    def _begin(self, number: int, request: Request, prompt: Sequence[int], output: Sequence[int] = ()) -> Text:
        choosing, prompt_length, tokens = request.choosing, len(prompt), [*prompt, *output]
        if self.layout.family.encoder is not None:  # the rows of an output are of what the encoder has read, too
            self._shelf.forget(lambda text: text.request.prompt == request.prompt)
        block, shared = self._shelf.rows_for(tokens, prompt_length + request.max_new_tokens)
        processors = make_processors(
            self._rules,
            choosing,
            prompt_length=prompt_length,
            max_length=prompt_length + request.max_new_tokens,
            stop_tokens=request.stop_tokens,
        )
        noise = Noise(choosing.seed, self.layout.embedding.shape[0]) if choosing.is_sampled else None
        text = Text(request, tokens, block, shared, processors, noise)
        self._shelf.texts[number] = text
        return text

    @torch.inference_mode()
    def verify(self, checks: Sequence[Check]) -> PassReport:
        """One pass over the uncached committed tokens and the trees of requests; the accepted paths are committed.

        Raises `StorageError` when a file of the checkpoint has changed since it was opened. A request whose logits are
        not finite where a choice depends on them, or that leaves no token to choose, is refused alone.
        """
        started, self._stall_s = time.perf_counter(), 0.0
        parts = self._parts(checks)
        try:
            with self._multiplying():
                hidden = self._forward(parts)
                judged = self._judge(hidden, parts)
            self._checkpoint.check_unchanged()  # nothing comes of a pass that read what was being written
        except LlmcadError:
            self._checkpoint.check_unchanged()  # which explains whatever else went wrong
            raise
        verdicts = {number: found for number, found in judged.items() if isinstance(found, Verdict)}
        refused = {number: str(found) for number, found in judged.items() if not isinstance(found, Verdict)}
        for part in parts:
            if part.number not in refused:
                self._commit(part, verdicts.get(part.number))
        seconds = time.perf_counter() - started
        stats = PassStats(seconds, self._stall_s, seconds - self._stall_s, len(hidden))
        return PassReport(stats, verdicts, refused)

    def _parts(self, checks: Sequence[Check]) -> list[Part]:
        parts, first, scratch = list[Part](), 0, self._arena.end
        for check in checks:
            text = self._shelf.texts[check.number]
            pending = missing = len(text.tokens) - text.cached
            if check.most_prompt is not None and missing > check.most_prompt + 1:
                pending = check.most_prompt
            tree = check.tree if pending == missing else TokenTree.empty()
            parts.append(part := Part(check.number, text, tree, first, pending, scratch))
            first, scratch = first + part.rows, scratch + len(tree)
        nodes = scratch - self._arena.end
        if nodes > self._max_nodes:
            raise ValueError(f"the cache has room for trees of {self._max_nodes} nodes, not of {nodes}")
        return parts

    @torch.inference_mode()
    def logits_after(self, request: Request, output: Sequence[int], tokens: Sequence[int]) -> list[float]:
        """The logits of `tokens` behind the prompt and `output`, as the choice there sees them: rules included.

        Rows of this text that the cache holds are used: behind a plain run only the last one is computed, alone, as it
        was in that run. Raises as `verify`, and `EngineBusyError` where running requests leave no room.
        """
        number = -1  # of no request
        try:
            self._check_alone()
            text = self._begin(number, request, self._stack.begin(request.prompt), output)
        except ValueError as error:
            raise EngineBusyError(f"{error}; ask again when no other request is under way") from None
        try:
            part = self._parts([Check(number, TokenTree.empty())])[0]
            with self._multiplying():
                scores = self._logits(self._forward([part])[-1:]).float()
            self._checkpoint.check_unchanged()
            found: list[float] = text.processors(torch.tensor([text.tokens]), scores)[0, list(tokens)].tolist()
            return found
        finally:
            self.end(number)

    def _multiplying(self) -> AbstractContextManager[None]:
        """Around the products of a pass."""
        return linear.cores(self.dtype) if self._is_widened else nullcontext()

    def _forward(self, parts: Sequence[Part]) -> torch.Tensor:
        """Final hidden states [rows, hidden] of the parts."""
        ids = [token for part in parts for token in (*_pending_tokens(part), *part.tree.tokens.tolist())]
        places = np.concatenate([part.places for part in parts])
        positions = np.concatenate([part.positions for part in parts])
        end = self._arena.end + sum(len(part.tree) for part in parts)
        with self._arena.writing(places, positions, end):
            keys = self._arena.positions[:end]
            return self._stack.run(torch.tensor(ids), self._mask(parts, end), positions, keys, self._arena)

    def _mask(self, parts: Sequence[Part], end: int) -> chunks.BuildMask:
        """Builds the mask of a pass: every part sees its own text alone."""
        ancestors = [part.tree.ancestor_mask() for part in parts]

        def build(first: int, last: int) -> torch.Tensor:
            visible = np.zeros((last - first, end), dtype=bool)
            for part, above in zip(parts, ancestors, strict=True):
                part.show(visible, first, last, above)
            mask = torch.zeros(visible.shape, dtype=self.dtype)
            return mask.masked_fill_(torch.from_numpy(~visible), torch.finfo(self.dtype).min)[None, None]

        return build

    def _judge(self, hidden: torch.Tensor, parts: Sequence[Part]) -> dict[int, Verdict | CheckpointError]:
        """The verdict on each part that has one, or why its request cannot go on."""
        groups: tuple[list[Part], list[Part]] = ([], [])
        for part in parts:
            groups[part.text.needs_whole_rows].append(part)
        rows = [[row for part in group for row in part.chooses] for group in groups]
        choice, sound, logits = self._through_head(*(hidden[of_group] for of_group in rows))
        found: dict[int, Verdict | CheckpointError] = {}
        for is_whole, group in enumerate(groups):
            start = 0
            for part in group:
                own = slice(start, start + len(part.chooses))
                start = own.stop
                if part.has_root:
                    choices = self._path_choices(logits[own], part) if is_whole else (choice[own], sound[own])
                    found[part.number] = self._verdict(part, *choices, logits[own] if is_whole else None)
        return found

    def _path_choices(self, logits: torch.Tensor, part: Part) -> tuple[Choices, torch.Tensor]:
        text = part.text
        chosen = PathChoices(logits, text.processors, text.tokens, part.tree, text.noise)
        return chosen, is_sound(logits.max(dim=-1).values)

    def _verdict(
        self, part: Part, choices: Choices, sound: torch.Tensor, logits: torch.Tensor | None
    ) -> Verdict | CheckpointError:
        request = part.text.request
        try:
            accepted = walk(part.tree, SoundChoices(choices, sound, self._not_finite), frozenset(request.stop_tokens))
        except CheckpointError as error:
            return error
        logprobs: tuple[TokenLogprobs, ...] = ()
        if logits is not None and request.choosing.logprobs is not None:
            rows = [0, *(node + 1 for node in accepted.path)]
            logprobs = logprobs_of(logits[rows], accepted.emitted(part.tree), request.choosing.logprobs)
        return Verdict(accepted.path, accepted.bonus, accepted.stopped, logprobs)

    def _not_finite(self) -> CheckpointError:
        return not_finite("target", self._checkpoint.path, self.dtype)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Whole rows of logits [rows, vocab] in the computing type."""
        return self._through_head(hidden[:0], hidden)[2]

    def _through_head(self, plain: torch.Tensor, whole: torch.Tensor) -> tuple[np.ndarray, torch.Tensor, torch.Tensor]:
        """The head's rows are read once, for two groups of hidden states [rows, hidden].

        Of `plain`: the most probable token after each row, int64 [rows], ties to the lowest id; and which rows are
        sound. Of `whole`: logits [rows, vocab] in the computing type.
        """
        best = torch.full((len(plain),), -torch.inf)
        choice = torch.zeros(len(plain), dtype=torch.int64)
        logits = torch.empty(len(whole), self.layout.embedding.shape[0], dtype=self.dtype)
        for spec in self.layout.head:
            with self._leased(spec.name, spec.tensors) as tensors:
                for start, part in self._parts_of_logits(plain, spec, tensors):
                    value, index = part.float().max(dim=-1)
                    better = (value > best) | value.isnan()  # once it is no number it stays so
                    best[better], choice[better] = value[better], index[better] + start
                for start, part in self._parts_of_logits(whole, spec, tensors):
                    logits[:, start : start + part.shape[1]] = part
        return choice.numpy(), is_sound(best), logits

    def _parts_of_logits(
        self, hidden: torch.Tensor, spec: ShardSpec, tensors: Mapping[str, torch.Tensor]
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """(first id, logits [rows, part of the vocabulary]) of one shard of the head, part by part."""
        if not len(hidden):
            return
        weight, row = tensors[spec.tensors[0].name], spec.row_start
        for start, end in vocabulary.parts(len(hidden), len(weight)):
            bias = None if self._head_bias is None else self._head_bias[row + start : row + end]
            yield row + start, soft_capped(self._linear(hidden, weight[start:end], bias), self._softcap)

    def _commit(self, part: Part, verdict: Verdict | None) -> None:
        text = part.text
        text.cached += part.pending
        if verdict is not None:
            room = text.block.size - text.cached  # what is said beyond the last token that was asked for is not kept
            path = np.asarray(verdict.path[:room], np.int64)
            self._arena.copy(part.scratch + path, text.block.start + text.cached)
            text.cached += len(path)
            text.tokens += [*part.tree.tokens[path].tolist(), verdict.bonus]


def _pending_tokens(part: Part) -> list[int]:
    text = part.text
    return text.tokens[text.cached : text.cached + part.pending]


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
