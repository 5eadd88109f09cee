"""The resident draft model and the tree it grows.

One linear key/value cache serves the whole tree (LLMCad, section on token tree generation): a mask row lets a node
see the committed prefix, its own ancestors and itself, so moving between branches costs nothing. Which nodes to run
next is the builder's business; when to hand over is the policy's.
"""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig

from llmcad_actors.core.budget import PREFIX_ROWS
from llmcad_actors.core.costs import Costs
from llmcad_actors.core.fallback import Policy
from llmcad_actors.core.growth import TreeBuilder
from llmcad_actors.core.round import Grown, Submission, Verdict
from llmcad_actors.core.trace import Recorder
from llmcad_actors.families.families import family_of
from llmcad_actors.kernels import linear
from llmcad_actors.models import vocabulary
from llmcad_actors.models.kv_cache import TreeCache
from llmcad_actors.models.loading import reads_model
from llmcad_actors.models.skeleton import auto_model
from llmcad_actors.models.softcap import soft_capped, softcap_of
from llmcad_actors.models.sound import is_sound, not_finite
from llmcad_actors.models.stacks import stack_of
from llmcad_actors.models.target import common_prefix
from llmcad_actors.models.thin_imports import with_shapes


class DraftModel:
    """The model with its tree-masked cache: rows in, candidates out."""

    def __init__(self, path: Path, *, dtype: torch.dtype, vocab: int, context: int, slots: int, children: int) -> None:
        """`vocab`: ids at or above it are never proposed (padded vocabularies).

        context, slots: rows of the cache for the committed prefix and for tree nodes.
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
        self.cache = TreeCache(family.num_layers(config), context + slots)
        self._positions = np.zeros(context + slots, dtype=np.int64)  # of the cache's rows
        self._softcap = softcap_of(self._model.config)
        self._hidden_value = torch.finfo(dtype).min
        self._ancestors = torch.full((slots, slots), self._hidden_value, dtype=dtype)

    def begin(self, prompt: Sequence[int]) -> tuple[int, ...]:
        """Start on a prompt; returns the tokens that the decoder's text begins with."""
        return self._stack.begin(prompt[: self._longest])

    @torch.inference_mode()
    def run_prefix(self, tokens: Sequence[int], start: int) -> tuple[np.ndarray, np.ndarray]:
        """Run consecutive tokens at positions start, ...; candidates [1, children] of the last one."""
        for first in range(0, len(tokens), PREFIX_ROWS):
            part, position = tokens[first : first + PREFIX_ROWS], start + first
            mask = torch.zeros(len(part), position + len(part), dtype=self._mask_dtype)
            future = torch.ones(len(part), len(part), dtype=torch.bool).triu_(1)
            mask[:, position:].masked_fill_(future, self._hidden_value)
            hidden = self._forward(part, range(position, position + len(part)), mask)
        return self._candidates(hidden[-1:])

    @torch.inference_mode()
    def run_nodes(
        self, tokens: np.ndarray, positions: np.ndarray, parents: np.ndarray, committed: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Run tree nodes whose parents sit in slots `parents` (-1: the root); candidates [nodes, children]."""
        first, rows = self.cache.length - committed, len(tokens)
        used = first + rows
        self._ancestors[:used, first:used] = self._hidden_value  # older nodes do not see newer ones
        own = self._ancestors[first:used, :used]
        own[:, :first] = self._hidden_value
        inner = torch.from_numpy(np.flatnonzero(parents >= 0))
        own[inner, :first] = self._ancestors[torch.from_numpy(parents[parents >= 0]), :first]
        own[:, first:].fill_diagonal_(0)
        mask = torch.zeros(rows, committed + used, dtype=self._mask_dtype)
        mask[:, committed:] = own
        return self._candidates(self._forward(tokens, positions, mask))

    @torch.inference_mode()
    def keep(self, committed: int, slots: np.ndarray, new_committed: int) -> None:
        """Keep the first `committed` rows and then `slots` (ascending); the leading ones join the prefix."""
        self.cache.keep(committed, (committed + slots).tolist())
        self._positions[committed : committed + len(slots)] = self._positions[committed + slots]
        tree = torch.from_numpy(slots[new_committed - committed :])
        if len(tree):
            self._ancestors[: len(tree), : len(tree)] = self._ancestors[tree][:, tree]

    def _forward(
        self, tokens: Sequence[int] | np.ndarray, positions: Sequence[int] | np.ndarray, mask: torch.Tensor
    ) -> torch.Tensor:
        start, end = self.cache.length, self.cache.length + len(tokens)
        self._positions[start:end] = positions
        # A target with a larger padded vocabulary may say an id that is not here; the last one stands in for it.
        ids = np.minimum(np.asarray(tokens, dtype=np.int64), self._base.get_input_embeddings().num_embeddings - 1)
        positions_of_rows, positions_of_keys = self._positions[start:end], self._positions[:end]
        with linear.cores(self._mask_dtype) if self._is_widened else nullcontext():
            return self._stack.run(
                torch.from_numpy(ids), mask[None, None], positions_of_rows, positions_of_keys, self.cache
            )

    def _candidates(self, hidden: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and log-probabilities [rows, children] of the most probable tokens."""
        found = [self._best_of(hidden, start, end) for start, end in vocabulary.parts(len(hidden), self._vocab)]
        values, tokens, sums = (
            found[0] if len(found) == 1 else map(partial(torch.cat, dim=-1), zip(*found, strict=True))
        )
        if len(found) > 1:
            values, order = values.topk(self._children, dim=-1)
            tokens, sums = tokens.gather(-1, order), sums.logsumexp(dim=-1, keepdim=True)
        if not is_sound(values[:, 0]).all():
            raise not_finite("draft", self._path, self._mask_dtype)
        return tokens.numpy(), (values - sums).numpy()

    def _best_of(self, hidden: torch.Tensor, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of a part of the vocabulary: the largest logits [rows, n], their ids, log of the sum of all [rows, 1]."""
        bias = None if self._head.bias is None else self._head.bias[start:end]
        logits = self._linear(hidden, self._head.weight[start:end], bias)
        if self._logits_bias is not None:
            logits = logits + self._logits_bias[start:end]
        logits = soft_capped(logits, self._softcap).float()
        values, tokens = logits.topk(min(self._children, end - start), dim=-1)
        return values, tokens + start, logits.logsumexp(dim=-1, keepdim=True)


class Draft:
    """A drafting session: committed tokens, the builder's tree, and which slot each tree node sits in."""

    def __init__(
        self,
        model: DraftModel,
        builder: TreeBuilder,
        *,
        batch: int,
        max_positions: int,
        recorder: Recorder | None = None,
    ) -> None:
        """`batch`: nodes a step runs at most; `max_positions`: the draft's context, beyond which it is silent."""
        self._model = model
        self._builder = builder
        self._recorder = recorder or Recorder("draft", time.monotonic)
        self._batch = batch
        self._max_positions = max_positions
        self._tokens: list[int] = []
        self._committed = 0  # cache rows of the prefix; equals len(tokens) once the root has been run
        self._slots = np.empty(0, dtype=np.int64)  # by builder node; -1: not run
        self._submitted = np.empty(0, dtype=np.int64)  # builder nodes of the tree under verification
        self._catch_up_s = 0.0  # of the present tree, as in `Submission`

    def begin(self, prompt: Sequence[int]) -> None:
        """Start on a prompt; the cached prefix it shares with the previous one is kept."""
        text = self._model.begin(prompt)
        shared = common_prefix(self._tokens[: self._committed], text[:-1])
        self._model.cache.keep(shared, ())
        self._committed, self._tokens = shared, list(text)
        self._builder.reset()
        self._submitted = np.empty(0, dtype=np.int64)

    def grow(self, verdicts: Sequence[Verdict], policy: Policy, costs: Costs) -> Submission:
        """Commit `verdicts`, as the `Drafter` port has it, then grow until the policy says verify."""
        head_start = False
        for verdict in verdicts:
            head_start = self._reroot(verdict)
        self._catch_up_s = 0.0
        started, steps, drafted = time.perf_counter(), 0, 0
        while not self._is_done(policy, costs, time.perf_counter() - started):
            run = self.step(beyond=False)
            if not run:
                break
            steps, drafted = steps + 1, drafted + run
        growth, seconds = self._builder.growth(), time.perf_counter() - started
        limit = policy.choose_nodes(growth.cumulative, replace(costs, drafted_s=seconds))
        tree, self._submitted = self._builder.submission(limit)
        return Submission(tree, growth.best_frontier, steps, drafted, seconds, head_start, self._catch_up_s)

    def extend(self, max_steps: int) -> Grown:
        """Up to `max_steps` more steps beyond the submitted tree."""
        steps = drafted = 0
        while steps < max_steps and (run := self.step(beyond=True)):
            steps, drafted = steps + 1, drafted + run
        return Grown(steps, drafted, steps == max_steps)

    def _is_done(self, policy: Policy, costs: Costs, seconds: float) -> bool:
        if not self._builder.is_expanded(-1):
            return False
        growth = self._builder.growth()
        return growth.exhausted or policy.should_verify(growth, replace(costs, drafted_s=seconds))

    def step(self, *, beyond: bool) -> int:
        """One forward pass of the draft; returns the nodes it ran, 0 when there is nothing left to run."""
        started = self._recorder.now()
        if run := self._step(beyond):
            self._recorder.add("step", started, nodes=run, provisional=beyond)
        return run

    def _step(self, beyond: bool) -> int:
        root = len(self._tokens) - 1
        room = self._model.slots - (self._model.cache.length - self._committed)
        nodes = np.asarray(self._builder.next_nodes(min(self._batch, room), beyond=beyond), dtype=np.int64)
        if len(nodes) and nodes[0] == -1:
            return self._run_root(root)
        return self._run_nodes(nodes[root + self._builder.rows(nodes)[2] < self._max_positions], root)

    def _run_root(self, root: int) -> int:
        if root >= self._max_positions:
            return 0
        unseen, started = self._tokens[self._committed :], time.perf_counter()
        tokens, logprobs = self._model.run_prefix(unseen, self._committed)
        if len(unseen) > self._batch:  # more than a step is
            self._catch_up_s = time.perf_counter() - started
        self._committed = len(self._tokens)
        self._builder.expand([-1], tokens, logprobs)
        self._slots = np.full(len(self._builder), -1, dtype=np.int64)
        return 1

    def _run_nodes(self, nodes: np.ndarray, root: int) -> int:
        if not len(nodes):
            return 0
        tokens, parents, depths = self._builder.rows(nodes)
        parent_slots = np.where(parents >= 0, self._slots[parents], -1)
        first = self._model.cache.length - self._committed
        candidates = self._model.run_nodes(tokens, root + depths, parent_slots, self._committed)
        self._slots[nodes] = np.arange(first, first + len(nodes))
        self._builder.expand(nodes.tolist(), *candidates)
        grown = len(self._builder) - len(self._slots)
        self._slots = np.concatenate([self._slots, np.full(grown, -1, dtype=np.int64)])
        return len(nodes)

    def _reroot(self, verdict: Verdict) -> bool:
        started = self._recorder.now()
        head_start = self._commit(verdict)
        self._recorder.add("reroot", started, head_start=head_start, nodes=len(self._builder))
        return head_start

    def _commit(self, verdict: Verdict) -> bool:
        """Move to the verdict's bonus token; True when the draft had already run it (a head start)."""
        path = self._submitted[list(verdict.path)]
        self._submitted = np.empty(0, dtype=np.int64)
        self._builder.observe(path, verdict.bonus)
        self._tokens += [*self._builder.rows(path)[0].tolist(), verdict.bonus]
        run = [int(slot) for slot in self._slots[path] if slot >= 0]
        parent = int(path[-1]) if len(path) else -1
        bonus = self._builder.find(parent, verdict.bonus) if self._builder.is_expanded(parent) else None
        committed = self._committed
        if bonus is None or not self._builder.is_expanded(bonus):
            self._builder.reset()
            self._model.keep(committed, np.asarray(run, dtype=np.int64), committed + len(run))
            self._committed = committed + len(run)
            return False
        prefix = [*run, int(self._slots[bonus])]
        self._slots = self._slots[self._builder.reroot(bonus)]
        survivors = np.flatnonzero(self._slots >= 0)
        order = survivors[np.argsort(self._slots[survivors])]
        self._committed = committed + len(prefix)
        self._model.keep(committed, np.asarray([*prefix, *self._slots[order]], dtype=np.int64), self._committed)
        self._slots[order] = np.arange(len(order))
        return True
