"""From settings to a plan: what is opened, checked and laid out before any process starts. Reads headers only."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmcad_actors.config import DraftSpec, EngineConfig, LoaderSpec, VerifierSpec
from llmcad_actors.core.budget import (
    EMBEDDING_CACHE_BYTES,
    BudgetInputs,
    MemoryPlan,
    Shard,
    parse_rate,
    parse_size,
    plan,
)
from llmcad_actors.core.costs import CostModel
from llmcad_actors.core.fallback import (
    AdaptiveConfidence,
    FixedDepth,
    FixedTree,
    MarginalThroughput,
    Policy,
    TokenConfidence,
)
from llmcad_actors.errors import ConfigError
from llmcad_actors.forecast import Forecaster, PassForecast
from llmcad_actors.limits import memory_limit, within
from llmcad_actors.model_names import find_model
from llmcad_actors.models import thin_imports
from llmcad_actors.models.families import family_of
from llmcad_actors.models.generation_rules import active_rules, ignored_rules
from llmcad_actors.models.tokenizer import check_same_vocabulary
from llmcad_actors.processor import cores, has_bfloat16
from llmcad_actors.storage.checkpoint import Checkpoint
from llmcad_actors.storage.layout import Layout, ShardSpec, layout_of
from llmcad_actors.storage.pieces import pieces_of
from llmcad_actors.storage.reader import span_bytes

if TYPE_CHECKING:
    from llmcad_actors.models.chat import ChatTemplate

DEFAULT_CONTEXT = 2048
PADDING = 256
"""Rows of a long pass are padded to multiples of this."""

DRAFT_SLOTS = 1024
"""Tree nodes whose keys and values the draft holds at once."""

MB = 1_000_000
DAEMONS = 83 * MB
THIN_PROCESSES = 232 * MB  # the caller, the coordinator, the loader
TORCH_PROCESS = 233 * MB
WHOLE_TORCH_PROCESS = 335 * MB  # with all that an untested torch imports
"""Proportional set sizes after start, without weights, as `benchmarks/memory.py` measures them, and 3 %."""

SMALL_DRAFT_BYTES = 256 << 20


@dataclass(frozen=True)
class Prepared:
    """A checked job: everything that the actors are built from."""

    config: EngineConfig
    target: Checkpoint
    layout: Layout
    draft: Checkpoint | None
    memory: MemoryPlan
    context: int  # tokens of prompt and output together
    notices: tuple[str, ...] = ()  # what the user should know: settings that were changed, or are not followed

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """End-of-text ids. A generation config that names none has none, as in `generate`."""
        eos = self.target.generation_settings.get("eos_token_id")
        if eos is None:
            return ()
        return tuple(eos) if isinstance(eos, list) else (int(eos),)

    @property
    def is_encoder_decoder(self) -> bool:
        """The prompt goes to an encoder; the decoder's text is the output alone, behind a first token."""
        return bool(self.layout.encoder)

    def room(self, prompt_tokens: int) -> int:
        """New tokens that fit behind a prompt; below 1: none, it is too long itself."""
        if self.is_encoder_decoder and prompt_tokens <= self.context:
            return self.context - 1
        return self.context - prompt_tokens

    def opening(self) -> tuple[int, ...]:
        """What an empty prompt stands for: the token that begins a text. Raises `ConfigError` where there is none."""
        bos = self.target.config.get("bos_token_id")
        if bos is None:
            raise ConfigError("the prompt is empty, and the model has no token to begin a text with; give a prompt")
        return (int(bos),)

    def chat_template(self) -> "ChatTemplate":
        """What goes around a user's message. Raises `TokenizerError` where the model has none."""
        from llmcad_actors.models.chat import read_chat_template  # here: jinja2 takes 6 MB, and few ask for it

        return read_chat_template(self.target.path)

    def policy(self) -> Policy:
        """The fallback policy that the settings name."""
        config = self.config
        policies: dict[str, Policy] = {
            "marginal": MarginalThroughput(),
            "adaptive": AdaptiveConfidence(config.alpha, config.alpha_update),
            "fixed-depth": FixedDepth(config.depth),
            "fixed-tree": FixedTree(config.widths),
            "token-confidence": TokenConfidence(config.threshold),
            "full-tree": FixedTree(),  # always max_nodes, by whatever builder
        }
        return policies[config.fallback]

    def costs(self) -> CostModel:
        """What is known of costs before anything has run."""
        per_pass = self.memory.bytes_per_pass
        return CostModel(window_share=min(1.0, self.memory.window_bytes / per_pass) if per_pass else 1.0)

    def forecast(self) -> dict[str, Any]:
        """The plan as numbers: what each part takes, what is pinned and streamed, the predicted pass."""
        predicted = self.predicted_pass()
        return {
            "parts": dict(self.memory.rows()),
            "total_bytes": self.memory.total_bytes,
            "memory_cap_bytes": self.memory.cap_bytes,
            "target_bytes": self.target.total_bytes,
            "pinned": list(self.memory.pinned),
            "streamed": list(self.memory.streamed),
            "bytes_per_pass": self.memory.bytes_per_pass,
            "bytes_per_prompt": self.memory.bytes_per_prompt,
            "rows_per_pass": predicted.rows,
            "read_seconds_per_pass": predicted.read_s,
            "compute_seconds_per_pass": predicted.compute_s,
            "seconds_per_pass": predicted.seconds,
            "tokens_per_pass_assumed": predicted.tokens,
            "tokens_per_second": predicted.tokens_per_second,
            "is_measured": predicted.is_measured,
        }

    def predicted_pass(self) -> PassForecast:
        """A pass as this machine would run it."""
        config, stored = self.config, stored_bytes(self.target)
        forecaster = Forecaster.of(
            self.target.path,
            read_bytes=self.memory.bytes_per_pass,
            read_limit=parse_rate(config.read_limit) if config.read_limit else None,
            parameters=self.target.total_bytes // stored,
            dtype="float32" if stored == 4 else "bfloat16",
        )
        return forecaster.plain() if self.draft is None else forecaster.best(config.max_nodes)

    def loader_spec(self) -> LoaderSpec:
        limit = parse_rate(self.config.read_limit) if self.config.read_limit else None
        return LoaderSpec(
            path=str(self.target.path),
            pinned=self.memory.pinned,
            window_bytes=self.memory.window_bytes,
            piece_bytes=self.config.piece_bytes,
            chunk_bytes=self.config.chunk_bytes,
            threads=self.config.read_threads,
            rate_limit=limit,
            read_ahead=self.config.read_ahead and self.memory.overlaps,
        )

    def verifier_spec(self) -> VerifierSpec:
        return VerifierSpec(
            path=str(self.target.path),
            pinned=self.memory.pinned,
            dtype=self.config.dtype,
            threads=self.config.threads or cores(),
            capacity=self.context + 2 * self.config.max_nodes + 64,
            prefill_chunk=self.config.prefill_chunk,
        )

    def draft_spec(self) -> DraftSpec | None:
        if self.draft is None:
            return None
        config = self.config
        small = is_small(self.draft)
        return DraftSpec(
            path=str(self.draft.path),
            dtype=draft_dtype(config, self.draft),
            threads=config.draft_threads or (1 if small else cores()),
            vocab=self.layout.embedding.shape[0],
            context=min(self.context - 1, context_of(self.draft.config)),  # its last row proposes one more
            slots=DRAFT_SLOTS,
            builder="fixed" if config.fallback in ("fixed-depth", "fixed-tree") else config.builder,
            max_nodes=config.max_nodes,
            batch=config.batch,
            children=config.children,
            widths=(1,) * config.depth if config.fallback == "fixed-depth" else config.widths,
            slice_steps=2,
        )


def prepare(config: EngineConfig) -> Prepared:
    """Open and check everything, and split the memory cap. Raises the `UserError` that says what is wrong."""
    target = Checkpoint.open(find_model(config.target))
    layout = layout_of(target)
    active_rules(target.generation_settings, layout.embedding.shape[0])  # wrong values are refused here
    draft = Checkpoint.open(find_model(config.draft)) if config.draft else None
    if draft is not None:
        layout_of(draft)
        check_same_kind(target, draft)
        check_same_vocabulary(target.path, draft.path)
    context = config.max_context or min(context_of(target.config), DEFAULT_CONTEXT)
    if context > context_of(target.config):
        raise ConfigError(
            f"max_context: {context} is more than the target's context of {context_of(target.config)} tokens"
        )
    limit = memory_limit()
    cap, notices = within(parse_size(config.memory, limit.limit_bytes), limit)
    memory = plan(budget_inputs(config, target, layout, draft, context), cap)
    return Prepared(
        config, target, layout, draft, memory, context, (*notices, *unfollowed(target), *slow_window(memory))
    )


def check_same_kind(target: Checkpoint, draft: Checkpoint) -> None:
    """Raises `ConfigError` unless both have an encoder, or neither."""
    has_encoder = [family_of(each.config).encoder is not None for each in (target, draft)]
    if has_encoder[0] != has_encoder[1]:
        kinds = [f"{'an encoder-decoder' if each else 'a decoder-only'} model" for each in has_encoder]
        raise ConfigError(
            f"draft: {draft.path} ({draft.config['model_type']}) is {kinds[1]}, and the target "
            f"({target.config['model_type']}) is {kinds[0]}; choose a draft of the target's kind, or --draft none"
        )


def unfollowed(target: Checkpoint) -> tuple[str, ...]:
    """A notice of the settings of the model that are not followed."""
    ignored = ignored_rules(target.generation_settings)
    if not ignored:
        return ()
    return (f"the target's generation config sets {', '.join(ignored)}, which llmcad does not follow",)


def slow_window(memory: MemoryPlan) -> tuple[str, ...]:
    """What to know of a cap that leaves no room to read ahead."""
    if memory.overlaps:
        return ()
    return ("this cap has room for one shard of the target at a time: reading and computing take turns",)


def budget_inputs(
    config: EngineConfig, target: Checkpoint, layout: Layout, draft: Checkpoint | None, context: int
) -> BudgetInputs:
    """What each part will take, in bytes."""
    width = compute_bytes(target, config.dtype)
    return BudgetInputs(
        overhead_bytes=overhead_bytes(1 if draft is None else 2),
        draft_weights=0
        if draft is None
        else draft.total_bytes * compute_bytes(draft, draft_dtype(config, draft)) // stored_bytes(draft),
        draft_kv=0 if draft is None else draft_cache_bytes(draft, config, context),
        target_resident=sum(i.nbytes for i in layout.resident) * width // stored_bytes(target) + EMBEDDING_CACHE_BYTES,
        target_kv=kv_bytes(target.config, context + 2 * config.max_nodes, width)
        + encoded_bytes(target.config, context, width),
        activations=max(
            encoder_bytes(layout, target.config, context, width),
            activation_bytes(layout, target.config, context, config.max_nodes, config.prefill_chunk, width)
            + logits_bytes(target, layout, config.max_nodes, width),
        ),
        shards=tuple(budget_shard(spec, config.piece_bytes, spec in layout.encoder) for spec in layout.shards),
    )


def overhead_bytes(models: int) -> int:
    """What runs before anything of so many models is held."""
    return DAEMONS + THIN_PROCESSES + models * (TORCH_PROCESS if thin_imports.is_tested() else WHOLE_TORCH_PROCESS)


def budget_shard(spec: ShardSpec, piece_bytes: int, once: bool = False) -> Shard:
    """A shard as the budget sees it. once: only a prompt's first pass reads it."""
    spans = [span_bytes(piece.offset, piece.nbytes) for piece in pieces_of(spec, piece_bytes)]
    return Shard(spec.name, spec.nbytes, sum(spans), max(spans), once)


def draft_cache_bytes(draft: Checkpoint, config: EngineConfig, context: int) -> int:
    """Keys, values and the ancestor mask of the draft."""
    width = compute_bytes(draft, draft_dtype(config, draft))
    cached = kv_bytes(draft.config, context + DRAFT_SLOTS, width) + DRAFT_SLOTS * DRAFT_SLOTS * width
    return cached + encoded_bytes(draft.config, context, width)


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
    widest = max(max(tensor.shape) for tensor in layout.encoder[0].tensors)
    states = prompt * (4 * layout.embedding.shape[1] + 3 * widest) * width
    if layout.family.keeps_scores:
        states += prompt * prompt * (layout.family.num_heads(config) * 2 * width + 4 * 8)
    return states


def activation_bytes(
    prepared: Layout, config: Mapping[str, Any], context: int, nodes: int, chunk: int, width: int
) -> int:
    """The widest moment of a pass over a prompt of `context` tokens and a tree of `nodes`.

    Of all rows: what goes from layer to layer. Of `chunk` rows: a layer's intermediate states and the mask. Then the
    logits of the tree.
    """
    family, hidden = prepared.family, prepared.embedding.shape[1]
    rows = -(-(context + nodes) // PADDING) * PADDING
    chunk = min(rows, chunk)
    rotary = 2 * family.head_dim(config) * (4 + width)  # two tables of angles, in float32 at first
    carried = rows * (4 * hidden * width + rotary)  # embedding rows, the model's inputs, hidden states before and after
    widest = max(max(tensor.shape) for tensor in prepared.layers[0].tensors)
    states = chunk * (4 * hidden + 3 * widest) * width
    if family.experts:  # the joined tensors of one
        states += 2 * max(tensor.nbytes for tensor in prepared.layers[0].tensors)
    states += chunk * rows * (width + 3) * (1 if family.windows == "none" else 2)
    if family.keeps_scores:
        states += family.num_heads(config) * chunk * rows * (4 + 2 * width)
    logits = (nodes + 1) * max(spec.tensors[0].shape[0] for spec in prepared.head) * (4 + width)
    return carried + max(states, logits)


def logits_bytes(target: Checkpoint, layout: Layout, nodes: int, width: int) -> int:
    """Whole rows of logits, which are kept only where the generation config has a say in the choice."""
    vocab = layout.embedding.shape[0]
    return (nodes + 1) * vocab * width if active_rules(target.generation_settings, vocab) else 0


def context_of(config: Mapping[str, Any]) -> int:
    """Tokens that the model was made for."""
    return family_of(config).context(config)


def is_small(draft: Checkpoint) -> bool:
    """A draft whose step one core runs in some milliseconds."""
    return draft.total_bytes < SMALL_DRAFT_BYTES


def draft_dtype(config: EngineConfig, draft: Checkpoint) -> str:
    """The type the draft computes in. Its numbers need not be anyone's: a small one takes the faster type."""
    return "float32" if config.dtype == "auto" and is_small(draft) and not has_bfloat16() else config.dtype


def stored_bytes(checkpoint: Checkpoint) -> int:
    """Bytes per stored number."""
    return 4 if checkpoint.dtype == "F32" else 2


def compute_bytes(checkpoint: Checkpoint, asked: str) -> int:
    """Bytes per number while computing."""
    return {"float32": 4, "bfloat16": 2, "auto": stored_bytes(checkpoint)}[asked]
