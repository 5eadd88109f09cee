"""From settings to a job: what is opened, checked and laid out before any process starts. Reads headers only."""

from dataclasses import replace

from llmcad_actors.config import EngineConfig
from llmcad_actors.core.budget import MemoryPlan, is_share, parse_rate, parse_size, plan, smallest_cap
from llmcad_actors.errors import ConfigError
from llmcad_actors.families.families import family_of
from llmcad_actors.families.generation_rules import (
    active_rules,
    first_token,
    ignored_rules,
    sampling_of,
    start_token,
    stop_tokens,
)
from llmcad_actors.machine.limits import free_memory, memory_limit, within, within_free
from llmcad_actors.machine.processor import cores
from llmcad_actors.machine.versions import newer_than_tested
from llmcad_actors.plan.footprint import (
    LEAST_NODES,
    budget_inputs,
    target_dtype,
)
from llmcad_actors.plan.job import Prepared, context_of
from llmcad_actors.plan.prediction import NODES_STEP, free_nodes, idle_draft
from llmcad_actors.plan.shorthand import spelled_out
from llmcad_actors.storage.checkpoint import Checkpoint
from llmcad_actors.storage.layout import Layout, check_heads, layout_of
from llmcad_actors.storage.model_names import find_model
from llmcad_actors.text.tokenizer import tokenizer_config
from llmcad_actors.text.tokenizer_child import check_same_vocabulary

DEFAULT_CONTEXT = 2048
LARGER_TREES_SHARE = 0.03  # of the cap, that the keys, values and logits of larger trees may take


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
    job = with_free_nodes(Prepared(config, target, layout, draft, memory, context, told, smallest_cap(inputs)))
    return replace(job, notices=(*told, *idle_draft(job)))


def with_free_nodes(job: Prepared) -> Prepared:
    """The same job with larger trees, where their rows are free and their memory is next to nothing of the cap."""
    if job.config.max_nodes is not None or job.draft is None:
        return job
    for nodes in range(free_nodes(job), LEAST_NODES, -NODES_STEP):
        config = replace(job.config, max_nodes=nodes)
        inputs = budget_inputs(config, job.target, job.layout, job.draft, job.context)
        more = smallest_cap(inputs) - job.least_bytes
        if more <= LARGER_TREES_SHARE * job.memory.cap_bytes and smallest_cap(inputs) <= job.memory.cap_bytes:
            return replace(job, config=config, memory=plan(inputs, job.memory.cap_bytes))
    return job


def check_settings(checkpoint: Checkpoint, layout: Layout) -> None:
    """Raises `UserError` for a value in the model's files that would stop a run later on, or lead it astray."""
    check_heads(checkpoint, layout)
    settings, vocab = checkpoint.generation_settings, layout.embedding.shape[0]
    stop_tokens(settings)
    sampling_of(settings)
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


def many_threads(config: EngineConfig) -> tuple[str, ...]:
    """A notice of more threads than cores, which wait for each other."""
    most = max(config.threads or 0, config.draft_threads or 0)
    if most <= cores():
        return ()
    return (f"{most} threads on {cores()} cores are slower than {cores()} threads",)
