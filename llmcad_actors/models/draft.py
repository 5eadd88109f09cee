"""The resident draft model and the trees it grows, one for each request, in shared steps.

One arena of keys and values serves all trees (LLMCad, section on token tree generation): a block for each text's
committed prefix, and a pool of slots for nodes. A mask row lets a node see its text's prefix, its own ancestors and
itself, so moving between branches, and texts, costs nothing. Which nodes to run next is the builders' business; when to
hand over is the policy's.
"""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig

from llmcad_actors.core.budget import PREFIX_ROWS
from llmcad_actors.core.choosing import LIKELY, Choosing, Noise, perturbed
from llmcad_actors.core.costs import Costs
from llmcad_actors.core.fallback import Policy
from llmcad_actors.core.growth import Growth, TreeBuilder
from llmcad_actors.core.request import Request
from llmcad_actors.core.round import Drafting, Grown, Submission, Verdict
from llmcad_actors.core.trace import Recorder
from llmcad_actors.core.tree import ROOT
from llmcad_actors.families.families import family_of
from llmcad_actors.kernels import linear
from llmcad_actors.messages import DraftOrder
from llmcad_actors.models import vocabulary
from llmcad_actors.models.kv_arena import Arena, Block, Shelf
from llmcad_actors.models.loading import reads_model
from llmcad_actors.models.skeleton import auto_model
from llmcad_actors.models.softcap import soft_capped, softcap_of
from llmcad_actors.models.sound import is_sound, not_finite
from llmcad_actors.models.stacks import stack_of
from llmcad_actors.models.thin_imports import with_shapes

BLOCK_ROWS = 16  # a text's rows are taken so many at a time, `DRAFT_BLOCK_ROWS` of the plan
POOL_ROWS = 128
FEW_TOKENS = 256  # so many new ones have room in a text's first block
MORE_TOKENS = 64  # and so many in a larger one
MOST_SHARED = 4  # times as many nodes as for one text, that a step runs for several

Candidates = tuple[np.ndarray, np.ndarray]
"""Token ids and log-probabilities [rows, children], descending."""


@dataclass(eq=False)
class Text:
    """A request's text as the draft has it, and the tree behind it."""

    request: Request
    builder: TreeBuilder
    tokens: list[int]
    block: Block
    cached: int  # rows of the prefix; equals len(tokens) once the root has been run
    noise: Noise | None
    slots: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))  # by builder node; -1: not run
    submitted: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))  # builder nodes under verification

    @property
    def root(self) -> int:
        """Its position."""
        return len(self.tokens) - 1


@dataclass(frozen=True, eq=False)
class Rows:
    """What a forward pass runs of one text: tokens of its prefix, or nodes of its tree."""

    text: Text
    tokens: np.ndarray
    positions: np.ndarray
    parents: np.ndarray | None = None  # of nodes: the slots of their parents, -1: the root; None: of the prefix

    def __len__(self) -> int:
        return len(self.tokens)


class DraftModel:
    """The model with its arena: rows in, candidates out."""

    def __init__(self, path: Path, *, dtype: torch.dtype, vocab: int, rows: int, slots: int, children: int) -> None:
        """`vocab`: ids at or above it are never proposed (padded vocabularies).

        rows, slots: of the arena, for committed prefixes and for tree nodes.
        """
        self._path = path
        with reads_model(path):
            config = AutoConfig.from_pretrained(path, local_files_only=True).to_dict()
            family = family_of(config)
            load = partial(auto_model(family).from_pretrained, path, dtype=dtype, local_files_only=True)
            self._model = with_shapes(load).eval()
        self._is_widened = linear.widening_pays(dtype)
        if self._is_widened:
            linear.install(torch.nn.ModuleList([self._model]), linear.widened)
        self._linear: linear.Linear = linear.widened if self._is_widened else torch.nn.functional.linear
        self._base = self._model.base_model
        self._stack = stack_of(self._model, self._model.generation_config.to_dict())
        self._head = self._model.get_output_embeddings()
        self._logits_bias = getattr(self._model, family.head_bias).flatten() if family.head_bias else None
        self._vocab = min(vocab, family.embedding_shape(config)[0])
        self._longest = family.context(config) if family.encoder else None  # what an encoder reads
        self.slots = slots
        self._children = min(children, self._vocab)
        self._mask_dtype = dtype
        self.arena = Arena(family.num_layers(config), rows + _rounded(slots, POOL_ROWS))
        self._pool = self.arena.take(0)
        self.num_used = 0  # slots
        self._softcap = softcap_of(self._model.config)
        self._hidden_value = torch.finfo(dtype).min
        self._ancestors = torch.full((slots, slots), self._hidden_value, dtype=dtype)

    def begin(self, prompt: Sequence[int]) -> tuple[int, ...]:
        """Start on a prompt; returns the tokens that the decoder's text begins with."""
        return self._stack.begin(prompt[: self._longest])

    def noise(self, choosing: Choosing) -> Noise | None:
        return Noise(choosing.seed, self._vocab) if choosing.is_sampled else None

    @torch.inference_mode()
    def run(self, groups: Sequence[Rows]) -> list[Candidates]:
        """One forward pass. Candidates of each group: of the last row of a prefix, of every node.

        A text's prefix rows follow the ones that are cached; nodes take the next slots, in their order.
        """
        for rows in groups:
            if rows.parents is None:
                self._grow_block(rows.text, rows.text.cached + len(rows))
        num_nodes = sum(len(rows) for rows in groups if rows.parents is not None)
        if self._pool.size < self.num_used + num_nodes:
            self.arena.resize(self._pool, _rounded(self.num_used + num_nodes, POOL_ROWS))
        places, mask = self._places_and_mask(groups)
        hidden = self._forward(groups, places, mask)
        self.num_used += num_nodes
        for rows in groups:
            if rows.parents is None:
                rows.text.cached += len(rows)
        return self._candidates(groups, hidden)

    @torch.inference_mode()
    def commit(self, text: Text, slots: Sequence[int]) -> None:
        """Nodes in `slots`, a path from the root, join the text's prefix."""
        self._grow_block(text, text.cached + len(slots))
        self.arena.copy(self._pool.start + np.asarray(slots, np.int64), text.block.start + text.cached)
        text.cached += len(slots)

    @torch.inference_mode()
    def keep(self, texts: Sequence[Text]) -> None:
        """Of all nodes, only those of these texts' trees stay; their slots are renumbered."""
        kept = np.sort(np.concatenate([text.slots[text.slots >= 0] for text in texts] or [np.empty(0, np.int64)]))
        if len(kept) == self.num_used:
            return
        self.arena.copy(self._pool.start + kept, self._pool.start)
        index = torch.from_numpy(kept)
        self._ancestors[: len(kept), : len(kept)] = self._ancestors[index][:, index]
        new = np.full(self.num_used + 1, -1, np.int64)  # the last one stands for nodes that were not run
        new[kept] = np.arange(len(kept))
        for text in texts:
            text.slots = new[text.slots]
        self.num_used = len(kept)
        self.arena.resize(self._pool, _rounded(len(kept), POOL_ROWS))  # fewer rows to look at

    def _grow_block(self, text: Text, rows: int) -> None:
        if text.block.size < rows:
            more = _rounded(rows + MORE_TOKENS, BLOCK_ROWS)
            fits = self.arena.fits(more - text.block.size)
            self.arena.resize(text.block, more if fits else _rounded(rows, BLOCK_ROWS))

    def _places_and_mask(self, groups: Sequence[Rows]) -> tuple[np.ndarray, torch.Tensor]:
        """Where in the arena the rows go, and what they see of it, additive [rows, columns]."""
        mask = torch.full((sum(map(len, groups)), self.arena.end), self._hidden_value, dtype=self._mask_dtype)
        places, first, slot = list[np.ndarray](), 0, self.num_used
        for rows in groups:
            own, begin, cached = mask[first : first + len(rows)], rows.text.block.start, rows.text.cached
            own[:, begin : begin + cached] = 0
            if rows.parents is None:
                future = torch.full((len(rows), len(rows)), self._hidden_value, dtype=self._mask_dtype).triu_(1)
                own[:, begin + cached : begin + cached + len(rows)] = future
                places.append(np.arange(begin + cached, begin + cached + len(rows)))
            else:
                seen = self._see(rows.parents, slot)
                own[:, self._pool.start : self._pool.start + seen.shape[1]] = seen
                places.append(self._pool.start + np.arange(slot, slot + len(rows)))
                slot += len(rows)
            first += len(rows)
        return np.concatenate(places), mask

    def _see(self, parents: np.ndarray, first: int) -> torch.Tensor:
        """Note down the ancestors of nodes that take the slots from `first` on: their rows of the mask of slots."""
        used = first + len(parents)
        self._ancestors[:used, first:used] = self._hidden_value  # older nodes do not see newer ones
        own = self._ancestors[first:used, :used]
        own[:, :first] = self._hidden_value
        inner = torch.from_numpy(np.flatnonzero(parents >= 0))
        own[inner, :first] = self._ancestors[torch.from_numpy(parents[parents >= 0]), :first]
        own[:, first:].fill_diagonal_(0)
        return own

    def _forward(self, groups: Sequence[Rows], places: np.ndarray, mask: torch.Tensor) -> torch.Tensor:
        # A target with a larger padded vocabulary may say an id that is not here; the last one stands in for it.
        ids = np.concatenate([rows.tokens for rows in groups])
        ids = np.minimum(ids, self._base.get_input_embeddings().num_embeddings - 1)
        positions, end = np.concatenate([rows.positions for rows in groups]), mask.shape[1]
        with (
            linear.cores(self._mask_dtype) if self._is_widened else nullcontext(),
            self.arena.writing(places, positions, end),
        ):
            keys = self.arena.positions[:end]
            return self._stack.run(torch.from_numpy(ids), mask[None, None], positions, keys, self.arena)

    def _candidates(self, groups: Sequence[Rows], hidden: torch.Tensor) -> list[Candidates]:
        ends = np.cumsum([len(rows) for rows in groups])
        wanted = [
            np.arange(end - (1 if rows.parents is None else len(rows)), end)
            for rows, end in zip(groups, ends.tolist(), strict=True)
        ]
        is_sampled = any(rows.text.noise is not None for rows in groups)
        count = min(max(self._children, LIKELY), self._vocab) if is_sampled else self._children
        tokens, logits, totals = self._best(hidden[np.concatenate(wanted)], count)
        found, first = list[Candidates](), 0
        for rows, of_rows in zip(groups, wanted, strict=True):
            own = slice(first, first + len(of_rows))
            first = own.stop
            if rows.text.noise is None:
                found.append((tokens[own, : self._children], (logits[own] - totals[own])[:, : self._children]))
            else:
                after = rows.positions[-len(of_rows) :] + 1
                choosing, noise = rows.text.request.choosing, rows.text.noise
                found.append(perturbed(tokens[own], logits[own], after, choosing, noise, self._children))
        return found

    def _best(self, hidden: torch.Tensor, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each row the most probable tokens [rows, count], their logits, and the log of the sum of all [rows, 1]."""
        parts = vocabulary.parts(len(hidden), self._vocab)
        found = [self._best_of(hidden, start, end, count) for start, end in parts]
        values, tokens, sums = (
            found[0] if len(found) == 1 else map(partial(torch.cat, dim=-1), zip(*found, strict=True))
        )
        if len(found) > 1:
            values, order = values.topk(count, dim=-1)
            tokens, sums = tokens.gather(-1, order), sums.logsumexp(dim=-1, keepdim=True)
        if not is_sound(values[:, 0]).all():
            raise not_finite("draft", self._path, self._mask_dtype)
        return tokens.numpy(), values.numpy(), sums.numpy()

    def _best_of(
        self, hidden: torch.Tensor, start: int, end: int, count: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of a part of the vocabulary: the largest logits [rows, n], their ids, log of the sum of all [rows, 1]."""
        bias = None if self._head.bias is None else self._head.bias[start:end]
        logits = self._linear(hidden, self._head.weight[start:end], bias)
        if self._logits_bias is not None:
            logits = logits + self._logits_bias[start:end]
        logits = soft_capped(logits, self._softcap).float()
        values, tokens = logits.topk(min(count, end - start), dim=-1)
        return values, tokens + start, logits.logsumexp(dim=-1, keepdim=True)


class Draft:
    """The drafting of all requests: their texts, and the trees that grow behind them."""

    def __init__(
        self,
        model: DraftModel,
        builder: TreeBuilder,
        *,
        batch: int,
        max_positions: int,
        max_nodes: int = 10**9,
        whole_nodes: int = 10**9,
        recorder: Recorder | None = None,
    ) -> None:
        """`batch`: nodes a step runs of a text; `max_positions`: the draft's context, beyond which it is silent.

        builder: of which every text gets a sibling. max_nodes: that are handed over at most, of all texts together;
        whole_nodes: of those texts whose choices look at whole rows of logits.
        """
        self._model = model
        self._builder = builder
        self._recorder = recorder or Recorder("draft", time.monotonic)
        self._batch = batch
        self._max_positions = max_positions
        self._max_nodes = max_nodes
        self._whole_nodes = whole_nodes
        self._shelf = Shelf[Text](model.arena)
        self._growing: list[Text] = []
        self._catch_up_s = 0.0  # of the present round, as in `Drafting`

    def grow(self, order: DraftOrder) -> Drafting:
        """As the `Drafter` port has it."""
        for number in order.ended:
            self._shelf.end(number)
        for number, request in order.joined.items():
            self._join(number, request)
        self._growing = [self._shelf.texts[number] for number in order.verdicts]
        head_starts = [self._catch_up(text, order.verdicts[number]) for number, text in self._shelf_of(order)]
        self._model.keep(list(self._shelf.texts.values()))
        self._catch_up_s, started, steps, drafted = 0.0, time.perf_counter(), 0, 0
        while not self._is_done(order.policy, order.costs, time.perf_counter() - started):
            run = self.step(beyond=False)
            if not run:
                break
            steps, drafted = steps + 1, drafted + run
        seconds = time.perf_counter() - started
        limits, confidence = self._share_out(order.policy, replace(order.costs, drafted_s=seconds))
        trees = {}
        for (number, text), limit, head_start in zip(self._shelf_of(order), limits, head_starts, strict=True):
            tree, text.submitted = text.builder.submission(limit)
            trees[number] = Submission(tree, head_start)
        return Drafting(trees, confidence, steps, drafted, seconds, self._catch_up_s)

    def extend(self, max_steps: int) -> Grown:
        """Up to `max_steps` more steps beyond the submitted trees."""
        steps = drafted = 0
        while steps < max_steps and (run := self.step(beyond=True)):
            steps, drafted = steps + 1, drafted + run
        return Grown(steps, drafted, steps == max_steps)

    def step(self, *, beyond: bool) -> int:
        """One forward pass of the draft; returns the nodes it ran, 0 when there is nothing left to run."""
        started = self._recorder.now()
        if run := self._step(beyond):
            self._recorder.add("step", started, nodes=run, provisional=beyond)
        return run

    def _shelf_of(self, order: DraftOrder) -> list[tuple[int, Text]]:
        return [(number, self._shelf.texts[number]) for number in order.verdicts]

    def _join(self, number: int, request: Request) -> None:
        tokens = self._model.begin(request.prompt)
        expected = len(tokens) + min(request.max_new_tokens, FEW_TOKENS)
        block, shared = self._shelf.rows_for(tokens, _rounded(expected, BLOCK_ROWS))
        self._shelf.forget()  # the fewer rows are held, the fewer a step looks at
        noise = self._model.noise(request.choosing)
        self._shelf.texts[number] = Text(request, self._builder.sibling(), list(tokens), block, shared, noise)

    def _share_out(self, policy: Policy, costs: Costs) -> tuple[list[int], float]:
        """How many of its best nodes each text submits: those of all that the policy takes; and the paper's T_c."""
        growths = [text.builder.growth() for text in self._growing]
        if not growths:
            return [], 1.0
        cumulative = np.concatenate([growth.cumulative for growth in growths])
        owners = np.repeat(np.arange(len(growths)), [len(growth.cumulative) for growth in growths])
        ranked = owners[np.argsort(-cumulative, kind="stable")]
        taken = ranked[: min(policy.choose_nodes(-np.sort(-cumulative), costs), self._max_nodes)]
        is_whole = np.array([text.request.choosing.needs_whole_rows for text in self._growing])[taken]
        taken = taken[~is_whole | (np.cumsum(is_whole) <= self._whole_nodes)]
        counts = np.bincount(taken, minlength=len(growths)).tolist()
        return counts, max(growth.best_frontier for growth in growths)

    def _is_done(self, policy: Policy, costs: Costs, seconds: float) -> bool:
        for text in self._growing:
            if not text.builder.is_expanded(ROOT) and text.root < self._max_positions:
                return False
        growing = [text for text in self._growing if text.builder.is_expanded(ROOT)]  # others are beyond the context
        if not growing:
            return True
        growth = Growth.of_all([self._growth_of(text, len(growing)) for text in growing])
        return growth.exhausted or policy.should_verify(growth, replace(costs, drafted_s=seconds))

    def _growth_of(self, text: Text, num_texts: int) -> Growth:
        """A step runs less of each text's next nodes where there are many, so it gains less."""
        growth, share = text.builder.growth(), min(1.0, MOST_SHARED / num_texts)
        return growth if share == 1 else replace(growth, next_gain=share * growth.next_gain)

    def _step(self, beyond: bool) -> int:
        """Roots come first, all of them together; then nodes, the most probable ones of all trees."""
        waiting = [text for text in self._growing if not text.builder.is_expanded(ROOT)]
        roots = [text for text in waiting if text.root < self._max_positions]
        return self._run_roots(roots) if roots else self._run_nodes(beyond)

    def _run_roots(self, texts: Sequence[Text]) -> int:
        started, num_unseen = time.perf_counter(), sum(len(text.tokens) - text.cached for text in texts)
        groups = [self._last_part(text) for text in texts]
        for text, candidates in zip(texts, self._model.run(groups), strict=True):
            text.builder.expand([ROOT], *candidates)
            text.slots = np.full(len(text.builder), -1, np.int64)
        if num_unseen > self._batch * len(texts):  # more than a step is
            self._catch_up_s += time.perf_counter() - started
        return len(texts)

    def _last_part(self, text: Text) -> Rows:
        """What is not cached yet of a text; all but the last rows of a long one are run at once."""
        while True:
            first = text.cached
            tokens = np.array(text.tokens[first : first + PREFIX_ROWS], np.int64)
            rows = Rows(text, tokens, np.arange(first, first + len(tokens)))
            if first + len(tokens) == len(text.tokens):
                return rows
            self._model.run([rows])

    def _run_nodes(self, beyond: bool) -> int:
        groups, chosen = list[Rows](), list[list[int]]()
        for text, upcoming in self._next_nodes(beyond):
            tokens, parents, depths = text.builder.rows(upcoming)
            slots = np.where(parents >= 0, text.slots[parents], -1)
            groups.append(Rows(text, tokens, text.root + depths, slots))
            chosen.append(upcoming.tolist())
        if not groups:
            return 0
        first = self._model.num_used
        for rows, nodes, candidates in zip(groups, chosen, self._model.run(groups), strict=True):
            text = rows.text
            text.slots[nodes] = np.arange(first, first + len(nodes))
            first += len(nodes)
            text.builder.expand(nodes, *candidates)
            text.slots = np.append(text.slots, np.full(len(text.builder) - len(text.slots), -1, np.int64))
        return sum(map(len, chosen))

    def _next_nodes(self, beyond: bool) -> list[tuple[Text, np.ndarray]]:
        """The nodes of a step. Of several texts, the most probable ones of all."""
        room = self._model.slots - self._model.num_used
        most = min(room, self._batch * min(len(self._growing), MOST_SHARED))
        found = list[tuple[Text, np.ndarray]]()
        for text in self._growing:
            if text.builder.is_expanded(ROOT):
                nodes = np.asarray(text.builder.next_nodes(min(self._batch, room), beyond=beyond), np.int64)
                nodes = nodes[text.root + text.builder.rows(nodes)[2] < self._max_positions]
                if len(nodes):
                    found.append((text, nodes))
        if sum(len(nodes) for _, nodes in found) <= most:
            return found
        chances = np.sort(np.concatenate([text.builder.chances(nodes) for text, nodes in found]))
        best = ((text, nodes[text.builder.chances(nodes) > chances[-most - 1]]) for text, nodes in found)
        return [(text, nodes) for text, nodes in best if len(nodes)] or found[:1]

    def _catch_up(self, text: Text, verdicts: Sequence[Verdict]) -> bool:
        """Commit the verdicts of a text; True when the draft had already run the last one's bonus token."""
        head_start = False
        for verdict in verdicts:
            started = self._recorder.now()
            head_start = self._commit(text, verdict)
            self._recorder.add("reroot", started, head_start=head_start, nodes=len(text.builder))
        return head_start

    def _commit(self, text: Text, verdict: Verdict) -> bool:
        """Move to the verdict's bonus token; True when the draft had already run it (a head start)."""
        path, builder = text.submitted[list(verdict.path)], text.builder
        text.submitted = np.empty(0, np.int64)
        builder.observe(path, verdict.bonus)
        text.tokens += [*builder.rows(path)[0].tolist(), verdict.bonus]
        run = [int(slot) for slot in text.slots[path] if slot >= 0]
        parent = int(path[-1]) if len(path) else ROOT
        bonus = builder.find(parent, verdict.bonus) if builder.is_expanded(parent) else None
        if bonus is None or not builder.is_expanded(bonus):
            builder.reset()
            text.slots = np.empty(0, np.int64)
            self._model.commit(text, run)
            return False
        self._model.commit(text, [*run, int(text.slots[bonus])])
        text.slots = text.slots[builder.reroot(bonus)]
        return True


def _rounded(rows: int, unit: int) -> int:
    return -(-rows // unit) * unit
