"""From settings to a plan: what is opened, checked and laid out before any process starts. Reads headers only."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcad_actors.config import DraftSpec, EngineConfig, LoaderSpec, VerifierSpec
from llmcad_actors.core.budget import MemoryPlan, format_size, is_share, parse_rate, parse_size, plan, smallest_cap
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
from llmcad_actors.families.families import family_of
from llmcad_actors.families.generation_rules import active_rules, first_token, ignored_rules, start_token, stop_tokens
from llmcad_actors.machine.figures import Figures, figures_for
from llmcad_actors.machine.limits import free_memory, memory_limit, within, within_free
from llmcad_actors.machine.processor import cores
from llmcad_actors.machine.versions import newer_than_tested
from llmcad_actors.plan.disk_settings import read_settings
from llmcad_actors.plan.footprint import (
    DRAFT_SLOTS,
    WIDTHS,
    budget_inputs,
    draft_dtype,
    is_small,
    stored_bytes,
    target_dtype,
)
from llmcad_actors.plan.forecast import Forecaster, PassForecast
from llmcad_actors.plan.shorthand import spelled_out
from llmcad_actors.storage.checkpoint import Checkpoint
from llmcad_actors.storage.layout import Layout, check_heads, layout_of
from llmcad_actors.storage.model_names import find_model
from llmcad_actors.text.tokenizer import tokenizer_config
from llmcad_actors.text.tokenizer_child import check_same_vocabulary

if TYPE_CHECKING:
    from llmcad_actors.text.chat import ChatTemplate

DEFAULT_CONTEXT = 2048
GUESSED_ROWS = 32  # the pass that a first guess of costs is made for


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
    least_bytes: int = 0  # the smallest cap that would do

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """End-of-text ids. A generation config that names none has none, as in `generate`."""
        return stop_tokens(self.target.generation_settings)

    @property
    def is_encoder_decoder(self) -> bool:
        """The prompt goes to an encoder; the decoder's text is the output alone, behind a first token."""
        return bool(self.layout.encoder)

    @property
    def target_name(self) -> str:
        """The target as the user calls it: its name in a cache, or its directory's."""
        if self.target.path != Path(self.config.target).expanduser():
            return self.config.target
        return self.target.path.name or self.target.path.resolve().name

    @property
    def model_context(self) -> int:
        """Tokens that the target was made for, whatever is planned."""
        return context_of(self.target.config)

    def room(self, prompt_tokens: int) -> int:
        """New tokens that fit behind a prompt; below 1: none, it is too long itself."""
        if self.is_encoder_decoder and prompt_tokens <= self.context:
            return self.context - 1
        return self.context - prompt_tokens

    def opening(self) -> tuple[int, ...]:
        """What an empty prompt stands for: the token that begins a text. Raises `ConfigError` where there is none."""
        bos = first_token(self.target.config, self.layout.embedding.shape[0])
        if bos is None:
            raise ConfigError("the prompt is empty, and the model has no token to begin a text with; give a prompt")
        return (bos,)

    def chat_template(self) -> "ChatTemplate":
        """What goes around a user's message. Raises `TokenizerError` where the model has none."""
        from llmcad_actors.text.chat import read_chat_template  # here: jinja2 takes 6 MB, and few ask for it

        return read_chat_template(self.target.path)

    def check_unchanged(self) -> None:
        """Raises `StorageError` where a file of the target or the draft is no longer the one that was planned for."""
        for checkpoint in (self.target, self.draft):
            if checkpoint is not None:
                checkpoint.check_unchanged()

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

    @property
    def reads_ahead(self) -> bool:
        """A shard is read while another computes."""
        return self.config.read_ahead and self.memory.overlaps

    def costs(self) -> CostModel:
        """What is known of costs before anything has run."""
        forecaster = self._forecaster()
        (read_s, compute_s), (_, plain_s) = forecaster.of_rows(GUESSED_ROWS).halves, forecaster.plain().halves
        return CostModel(
            window_share=self._window_share,
            draft_step_s=forecaster.draft_step_s,
            read_s=read_s,
            mean_rows=GUESSED_ROWS,
            mean_compute_s=compute_s,
            overlaps=self.reads_ahead,
            plain_compute_s=plain_s,
        )

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
            "drafting_seconds_per_pass": predicted.drafting_s,
            "tokens_per_pass_assumed": predicted.tokens,
            "tokens_per_second": predicted.tokens_per_second,
            "seconds_per_token": predicted.seconds_per_token,
            "seconds_per_token_without_draft": self.without_draft().predicted_pass().seconds_per_token,
            "draft_pays": self.draft_pays,
            "is_measured": predicted.is_measured,
            "measured": str(self.measured() or ""),
        }

    def measured(self) -> Figures | None:
        """What `llmcad doctor` found on this machine, and when; None: nothing yet."""
        return figures_for(self.target.path)

    def predicted_pass(self) -> PassForecast:
        """A pass as this machine would run it."""
        forecaster = self._forecaster()
        return forecaster.plain() if self.draft is None else forecaster.best(self.config.max_nodes)

    def without_draft(self) -> "Prepared":
        """The same job with no draft, whose memory pins layers of the target."""
        if self.draft is None:
            return self
        inputs = budget_inputs(self.config, self.target, self.layout, None, self.context)
        return replace(self, draft=None, memory=plan(inputs, self.memory.cap_bytes))

    @property
    def draft_pays(self) -> bool | None:
        """Whether the plan expects more tokens per second with the draft; None where there is none."""
        if self.draft is None:
            return None
        predicted, plain = self.predicted_pass(), self.without_draft().predicted_pass()
        return predicted.rows > 1 and predicted.tokens_per_second > plain.tokens_per_second

    @property
    def draft_bytes(self) -> int:
        """Memory that the draft takes, with all that only it needs."""
        alone = self.without_draft().memory
        return self._bytes_beside_layers(self.memory) - self._bytes_beside_layers(alone)

    @staticmethod
    def _bytes_beside_layers(memory: MemoryPlan) -> int:
        return memory.total_bytes - memory.pinned_bytes - memory.window_bytes - memory.slack_bytes

    @property
    def _window_share(self) -> float:
        """Part of a pass's streamed bytes that are read while the draft works."""
        if not self.reads_ahead:
            return 0.0
        per_pass = self.memory.bytes_per_pass
        return min(1.0, self.memory.window_bytes / per_pass) if per_pass else 1.0

    def _forecaster(self) -> Forecaster:
        config, stored = self.config, stored_bytes(self.target)
        forecaster = Forecaster.of(
            self.target.path,
            read_bytes=self.memory.bytes_per_pass,
            read_limit=parse_rate(config.read_limit) if config.read_limit else None,
            parameters=self.target.total_bytes // stored,
            dtype=target_dtype(config),
            overlaps=self.reads_ahead,
            stored_bytes=stored,
        )
        hidden_s = self._window_share * forecaster.read_s
        return replace(forecaster, draft_step_s=self._draft_step_s(), hidden_s=hidden_s)

    def _draft_step_s(self) -> float:
        """Its weights are held in the type that it computes in."""
        if self.draft is None:
            return 0.0
        dtype = draft_dtype(self.config, self.draft)
        parameters = self.draft.total_bytes // stored_bytes(self.draft)
        forecaster = Forecaster.of(
            self.target.path,
            read_bytes=0,
            read_limit=None,
            parameters=parameters,
            dtype=dtype,
            stored_bytes=WIDTHS[dtype],
        )
        return forecaster.plain().compute_s

    def loader_spec(self) -> LoaderSpec:
        limit = parse_rate(self.config.read_limit) if self.config.read_limit else None
        threads, chunk_bytes = read_settings(self.config, self.target)
        return LoaderSpec(
            path=str(self.target.path),
            pinned=self.memory.pinned,
            window_bytes=self.memory.window_bytes,
            piece_bytes=self.config.piece_bytes,
            chunk_bytes=chunk_bytes,
            threads=threads,
            rate_limit=limit,
            read_ahead=self.reads_ahead,
        )

    def verifier_spec(self) -> VerifierSpec:
        return VerifierSpec(
            path=str(self.target.path),
            pinned=self.memory.pinned,
            dtype=target_dtype(self.config),
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
            sharpens=config.sharpen,
            slice_steps=2 if small else 1,  # a verdict waits for what has begun
        )


def prepare(config: EngineConfig) -> Prepared:
    """Open and check everything, and split the memory cap. Raises the `UserError` that says what is wrong."""
    config = spelled_out(config)
    if config.read_limit:
        parse_rate(config.read_limit)  # a wrong one is refused here
    target = Checkpoint.open(find_model(config.target))
    layout = layout_of(target)
    active_rules(target.generation_settings, layout.embedding.shape[0])  # wrong values are refused here
    check_settings(target, layout)
    draft = Checkpoint.open(find_model(config.draft)) if config.draft else None
    if draft is not None:
        check_settings(draft, layout_of(draft))
        check_same_kind(target, draft)
        check_same_vocabulary(target.path, draft.path)
    context = config.max_context or min(context_of(target.config), DEFAULT_CONTEXT)
    if context > context_of(target.config):
        raise ConfigError(
            f"max_context: {context} is more than the target's context of {context_of(target.config)} tokens"
        )
    limit = memory_limit()
    cap, notices = within(parse_size(str(config.memory), limit.limit_bytes), limit)
    inputs = budget_inputs(config, target, layout, draft, context)
    memory = plan(inputs, cap)
    if is_share(str(config.memory)):
        cap, lowered = within_free(cap, memory.total_bytes, free_memory())
        memory, notices = plan(inputs, cap), (*notices, *lowered)
    told = (*newer_than_tested(), *notices, *unfollowed(target), *inexact(config), *slow_window(memory))
    told = (*told, *many_threads(config))
    job = Prepared(config, target, layout, draft, memory, context, told, smallest_cap(inputs))
    return replace(job, notices=(*told, *idle_draft(job)))


def check_settings(checkpoint: Checkpoint, layout: Layout) -> None:
    """Raises `UserError` for a value in the model's files that would stop a run later on, or lead it astray."""
    check_heads(checkpoint, layout)
    settings, vocab = checkpoint.generation_settings, layout.embedding.shape[0]
    stop_tokens(settings)
    first_token(checkpoint.config, vocab)
    if layout.encoder:
        start_token(settings, checkpoint.config)
    layout.family.softcap(checkpoint.config)
    tokenizer_config(checkpoint.path)


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


def inexact(config: EngineConfig) -> tuple[str, ...]:
    """What computing in bfloat16 gives up."""
    if target_dtype(config) == "float32":
        return ()
    return (
        "in bfloat16 tokens that are nearly as likely as each other become equal: the text may differ from the model's "
        "own, and from run to run; --dtype auto keeps it exact",
    )


def slow_window(memory: MemoryPlan) -> tuple[str, ...]:
    """What to know of a cap that leaves no room to read ahead."""
    if memory.overlaps:
        return ()
    return ("this cap has room for one shard of the target at a time: reading and computing take turns",)


def idle_draft(job: Prepared) -> tuple[str, ...]:
    """A notice of a draft that is not expected to make anything faster."""
    if job.draft_pays is not False:
        return ()
    with_draft, without = (each.predicted_pass().seconds_per_token for each in (job, job.without_draft()))
    return (
        f"the plan expects nothing of the draft: {with_draft:.2g} s a token with it, {without:.2g} without; "
        f"--draft none frees {format_size(job.draft_bytes)}",
    )


def many_threads(config: EngineConfig) -> tuple[str, ...]:
    """A notice of more threads than cores, which wait for each other."""
    most = max(config.threads or 0, config.draft_threads or 0)
    if most <= cores():
        return ()
    return (f"{most} threads on {cores()} cores are slower than {cores()} threads",)


def context_of(config: Mapping[str, Any]) -> int:
    """Tokens that the model was made for."""
    return family_of(config).context(config)
