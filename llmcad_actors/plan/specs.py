"""What the actors of a job are built from."""

from llmcad_actors.config import DraftSpec, LoaderSpec, VerifierSpec
from llmcad_actors.core.budget import parse_rate
from llmcad_actors.core.fallback import (
    AdaptiveConfidence,
    FixedDepth,
    FixedTree,
    MarginalThroughput,
    Policy,
    TokenConfidence,
)
from llmcad_actors.core.rounds import Limits
from llmcad_actors.machine.processor import cores
from llmcad_actors.plan.disk_settings import read_settings
from llmcad_actors.plan.footprint import (
    DRAFT_SLOTS,
    draft_dtype,
    draft_rows,
    is_small,
    max_requests,
    nodes_of,
    target_dtype,
    text_rows,
    whole_rows,
)
from llmcad_actors.plan.job import Prepared, context_of


def policy_of(job: Prepared) -> Policy:
    """The fallback policy that the settings name."""
    config = job.config
    policies: dict[str, Policy] = {
        "marginal": MarginalThroughput(),
        "adaptive": AdaptiveConfidence(config.alpha, config.alpha_update),
        "fixed-depth": FixedDepth(config.depth),
        "fixed-tree": FixedTree(config.widths),
        "token-confidence": TokenConfidence(config.threshold),
        "full-tree": FixedTree(),  # always max_nodes, by whatever builder
    }
    return policies[config.fallback]


def limits_of(job: Prepared) -> Limits:
    """Requests that run at once."""
    rows = 10**9 if job.is_encoder_decoder else text_rows(job.config, job.context)
    return Limits(max_requests(job.config, job.layout), rows)


def loader_spec(job: Prepared) -> LoaderSpec:
    limit = parse_rate(job.config.read_limit) if job.config.read_limit else None
    threads, chunk_bytes = read_settings(job.config, job.target)
    return LoaderSpec(
        path=str(job.target.path),
        pinned=job.memory.pinned,
        window_bytes=job.memory.window_bytes,
        extent_bytes=job.config.extent_bytes,
        chunk_bytes=chunk_bytes,
        threads=threads,
        rate_limit=limit,
        read_ahead=job.reads_ahead,
    )


def verifier_spec(job: Prepared) -> VerifierSpec:
    return VerifierSpec(
        path=str(job.target.path),
        pinned=job.memory.pinned,
        pinned_later=job.pinned_later,
        dtype=target_dtype(job.config),
        threads=job.config.threads or cores(),
        capacity=text_rows(job.config, job.context),
        max_nodes=nodes_of(job.config),
        prefill_chunk=job.config.prefill_chunk,
    )


def draft_spec(job: Prepared) -> DraftSpec | None:
    if job.draft is None:
        return None
    config = job.config
    small = is_small(job.draft)
    return DraftSpec(
        path=str(job.draft.path),
        dtype=draft_dtype(config, job.draft),
        threads=config.draft_threads or (1 if small else cores()),
        vocab=job.layout.embedding.shape[0],
        context=min(job.context - 1, context_of(job.draft.config)),  # its last row proposes one more
        rows=draft_rows(config, job.context),
        slots=DRAFT_SLOTS,
        builder="fixed" if config.fallback in ("fixed-depth", "fixed-tree") else config.builder,
        max_nodes=nodes_of(config),
        whole_nodes=whole_rows(config, job.target, job.layout) - max_requests(config, job.layout),
        batch=config.batch,
        children=config.children,
        widths=(1,) * config.depth if config.fallback == "fixed-depth" else config.widths,
        sharpens=config.sharpen,
        slice_steps=2 if small else 1,  # a verdict waits for what has begun
    )
