"""What each part of a run takes, in bytes: from settings and headers, before anything runs."""

from collections.abc import Mapping
from typing import Any

from llmcad_actors.config import EngineConfig
from llmcad_actors.core.budget import EMBEDDING_CACHE_BYTES, LOGITS_BYTES, PREFIX_ROWS, BudgetInputs, Shard
from llmcad_actors.core.choosing import NOISE_BYTES
from llmcad_actors.families.families import family_of
from llmcad_actors.families.generation_rules import active_rules
from llmcad_actors.machine import versions
from llmcad_actors.machine.processor import has_bfloat16
from llmcad_actors.storage.checkpoint import Checkpoint
from llmcad_actors.storage.extents import extents_of
from llmcad_actors.storage.layout import Layout, ShardSpec, layout_of
from llmcad_actors.storage.reader import span_bytes
from llmcad_actors.text.tokenizer_child import tokenizer_memory

DRAFT_SLOTS = 1024
"""Tree nodes whose keys and values the draft holds at once."""

DRAFT_BLOCK_ROWS = 16
"""A text's rows of the draft's cache are taken so many at a time."""

LEAST_NODES = 128
"""Of a pass's trees at most, where no other number is asked for."""

MAX_REQUESTS = 8
"""That run at once, unless another number is asked for: as many of them as have room where one text of the planned
context has."""

TEXT_ROWS = 256
"""Prompt and output of a request, where so many requests are asked for that one text's room is less for each."""

MB = 1_000_000
DAEMONS = 83 * MB
PLAIN_DAEMONS = 375 * MB  # of a Ray as it comes: after some minutes, and 7 %, as its control store grows
THIN_PROCESSES = 232 * MB  # the caller, the coordinator, the loader
CALLER = 85 * MB
TORCH_PROCESS = 233 * MB
WHOLE_TORCH_PROCESS = 335 * MB  # with all that an untested torch imports
"""Proportional set sizes after start, without weights, as `benchmarks/memory.py` measures them, and 3 %."""

SMALL_DRAFT_BYTES = 256 << 20

WHOLE_LOGITS_BYTES = 16 << 20
LEAST_WHOLE_NODES = 16
"""Of float32 logits that sampling looks at in whole rows, and of the nodes of its trees, whatever the vocabulary."""

KEPT_CHUNKS = 2
"""Of a pass's mask, that are kept from layer to layer."""

PACKED_BYTES = 6
"""Of a number of rows that the kernels multiply: they lay rows out anew, on AMX as three numbers of 16 bits."""

WIDTHS = {"float32": 4, "bfloat16": 2}
"""Bytes of a number, by the type that is computed in."""


def budget_inputs(
    config: EngineConfig, target: Checkpoint, layout: Layout, draft: Checkpoint | None, context: int
) -> BudgetInputs:
    """What each part will take, in bytes."""
    width = WIDTHS[target_dtype(config)]
    overhead = overhead_bytes(1 if draft is None else 2, plain_ray=config.plain_ray)
    return BudgetInputs(
        overhead_bytes=overhead,
        tokenizer=tokenizer_bytes(target, overhead),
        draft_weights=0
        if draft is None
        else draft.total_bytes * WIDTHS[draft_dtype(config, draft)] // stored_bytes(draft),
        draft_kv=0 if draft is None else draft_cache_bytes(draft, config, context),
        target_resident=sum(i.nbytes for i in layout.resident) * width // stored_bytes(target) + EMBEDDING_CACHE_BYTES,
        target_kv=kv_bytes(target.config, text_rows(config, context) + nodes_of(config), width)
        + encoded_bytes(target.config, context, width),
        activations=max(
            encoder_bytes(layout, target.config, context, width),
            activation_bytes(layout, target.config, config, context, width)
            + whole_rows(config, target, layout) * layout.embedding.shape[0] * width,
        )
        + (0 if draft is None else draft_activation_bytes(draft, config, context)),
        shards=tuple(budget_shard(spec, config.extent_bytes, spec in layout.encoder) for spec in layout.shards),
    )


def overhead_bytes(models: int, *, plain_ray: bool = False) -> int:
    """What runs before anything of so many models is held."""
    torch_process = TORCH_PROCESS if versions.is_tested("torch") else WHOLE_TORCH_PROCESS
    return (PLAIN_DAEMONS if plain_ray else DAEMONS) + THIN_PROCESSES + models * torch_process


def tokenizer_bytes(target: Checkpoint, overhead: int) -> int:
    """What stays of the tokenizer in the caller's process.

    More, where loading it takes more than all that will run: it is loaded before anything else starts.
    """
    takes = tokenizer_memory(target.path)
    return max(takes.stays, CALLER + takes.peak - overhead)


def budget_shard(spec: ShardSpec, extent_bytes: int, once: bool = False) -> Shard:
    """A shard as the budget sees it. once: only a prompt's first pass reads it."""
    spans = [span_bytes(extent.offset, extent.nbytes) for extent in extents_of(spec, extent_bytes)]
    return Shard(spec.name, spec.nbytes, sum(spans), max(spans), once)


def draft_activation_bytes(draft: Checkpoint, config: EngineConfig, context: int) -> int:
    """The widest moment of a draft's step: a part of a prompt in a layer, or the logits of a batch."""
    layout, rows = layout_of(draft), min(PREFIX_ROWS, context)
    widest = max(max(tensor.shape) for tensor in layout.layers[0].tensors)
    states = rows * (4 * layout.embedding.shape[1] + 3 * widest) * 4 + rows * (context + DRAFT_SLOTS) * 4
    return max(states, part_of_logits_bytes(config.batch, layout.embedding.shape[0], 4)) + NOISE_BYTES


def draft_cache_bytes(draft: Checkpoint, config: EngineConfig, context: int) -> int:
    """Keys, values and the ancestor mask of the draft."""
    width = WIDTHS[draft_dtype(config, draft)]
    rows = draft_rows(config, context) + DRAFT_SLOTS
    cached = kv_bytes(draft.config, rows, width) + DRAFT_SLOTS * DRAFT_SLOTS * width
    return cached + encoded_bytes(draft.config, context, width)


def nodes_of(config: EngineConfig) -> int:
    """Tree nodes of a pass at most; `fitting_nodes` of the plan may find that more are free."""
    return config.max_nodes or LEAST_NODES


def text_rows(config: EngineConfig, context: int) -> int:
    """Rows of the target's cache for the texts of all requests; those of their trees are besides."""
    asked = config.max_requests or 1
    return max(context, asked * min(context, TEXT_ROWS)) + 1


def draft_rows(config: EngineConfig, context: int) -> int:
    """Rows of the draft's cache for texts."""
    return text_rows(config, context) + DRAFT_BLOCK_ROWS * (config.max_requests or MAX_REQUESTS)


def max_requests(config: EngineConfig, layout: Layout) -> int:
    """Requests that run at once at most: of an encoder-decoder model one."""
    return 1 if layout.encoder else config.max_requests or MAX_REQUESTS


def kv_bytes(config: Mapping[str, Any], rows: int, width: int) -> int:
    """Keys and values of `rows` tokens in all layers."""
    family = family_of(config)
    return 2 * family.num_layers(config) * family.num_kv_heads(config) * family.head_dim(config) * rows * width


def encoded_bytes(config: Mapping[str, Any], prompt: int, width: int) -> int:
    """What an encoder leaves of a prompt: its states, and the decoder layers' keys and values of them."""
    family = family_of(config)
    if family.encoder is None:
        return 0
    return prompt * family.embedding_shape(config)[1] * width + kv_bytes(config, prompt, width)


def encoder_bytes(layout: Layout, config: Mapping[str, Any], prompt: int, width: int) -> int:
    """The widest moment of an encoder over a whole prompt: a layer's intermediate states, and what is added to scores.

    T5 keeps a bias for each head and each pair of tokens, and lays a copy of it out in every layer.
    """
    if not layout.encoder:
        return 0
    widest = max(max(tensor.shape, default=1) for tensor in layout.encoder[0].tensors)
    states = prompt * (4 * layout.embedding.shape[1] + 3 * widest) * width
    if layout.family.holds_scores:
        states += prompt * prompt * (layout.family.num_heads(config) * 2 * width + 4 * 8)
    return states


def activation_bytes(
    prepared: Layout, config: Mapping[str, Any], settings: EngineConfig, context: int, width: int
) -> int:
    """The widest moment of a pass over a prompt of `context` tokens and the largest trees.

    Of all rows: what goes from layer to layer. Of a chunk of rows: a layer's intermediate states and the mask, whose
    columns are the rows of the cache. Then the logits of the trees.
    """
    family, hidden, nodes = prepared.family, prepared.embedding.shape[1], nodes_of(settings)
    rows = columns = text_rows(settings, context) + nodes
    chunk = min(rows, settings.prefill_chunk)
    rotary = 2 * family.head_dim(config) * (4 + width)  # two tables of angles, in float32 at first
    carried = rows * (4 * hidden * width + rotary)  # embedding rows, the model's inputs, hidden states before and after
    widest = max(max(tensor.shape, default=1) for tensor in prepared.layers[0].tensors)
    states = chunk * (4 * hidden + 3 * widest) * width + chunk * widest * PACKED_BYTES
    kinds = 1 if family.sliding_windows == "none" else 2  # of masks
    if family.experts:  # the joined tensors of one
        states += 2 * max(tensor.nbytes for tensor in prepared.layers[0].tensors)
    states += min(rows, KEPT_CHUNKS * chunk) * columns * width * kinds + chunk * columns * 3 * kinds
    if family.holds_scores:
        states += family.num_heads(config) * chunk * columns * (4 + 2 * width)
    slice_ = max(spec.tensors[0].shape[0] for spec in prepared.head)
    return carried + max(states, part_of_logits_bytes(nodes + 1, slice_, width))


def part_of_logits_bytes(rows: int, entries: int, width: int) -> int:
    """Logits of the part of the vocabulary that is looked at: in float32, as computed, and twice where capped."""
    return min(4 * rows * entries, LOGITS_BYTES) * (4 + 3 * width) // 4


def whole_rows(config: EngineConfig, target: Checkpoint, layout: Layout) -> int:
    """Rows of logits that are kept whole, for choices that are not the plain arg max.

    For all nodes of a pass where the model's generation config has a say in every choice; else for those of requests
    that sample, and so on, whose trees are cut to what some megabytes hold.
    """
    vocab, requests = layout.embedding.shape[0], max_requests(config, layout)
    most = nodes_of(config) + requests
    if active_rules(target.generation_settings, vocab):
        return most
    return min(most, max(WHOLE_LOGITS_BYTES // (4 * vocab), requests + LEAST_WHOLE_NODES))


def is_small(draft: Checkpoint) -> bool:
    """A draft whose step one core runs in some milliseconds."""
    return draft.total_bytes < SMALL_DRAFT_BYTES


def target_dtype(config: EngineConfig) -> str:
    """The type the target computes in: float32, whatever is stored, unless another is asked for."""
    return "float32" if config.dtype == "auto" else config.dtype


def draft_dtype(config: EngineConfig, draft: Checkpoint) -> str:
    """The type the draft computes in. Its numbers need not be anyone's: 16 bits where they are stored, and are fast."""
    if config.dtype != "auto":
        return config.dtype
    return "float32" if draft.dtype == "F32" or (is_small(draft) and not has_bfloat16()) else "bfloat16"


def stored_bytes(checkpoint: Checkpoint) -> int:
    """Bytes per stored number."""
    return 4 if checkpoint.dtype == "F32" else 2
