"""How fast a job will be: with its draft, without it, and what the policy begins with."""

from dataclasses import replace
from typing import Any

from llmcad_actors.core.budget import format_size, parse_rate
from llmcad_actors.core.costs import CostModel
from llmcad_actors.machine.figures import Figures, figures_for
from llmcad_actors.plan.footprint import (
    LEAST_NODES,
    WIDTHS,
    draft_dtype,
    kv_bytes,
    max_requests,
    nodes_of,
    stored_bytes,
    target_dtype,
    text_rows,
)
from llmcad_actors.plan.forecast import Forecaster, PassForecast
from llmcad_actors.plan.job import Prepared

SHORTEST_S = 1e-3  # a token: below it there is nothing to gain, and nobody waits
MOST_NODES, NODES_STEP = 512, 64  # of a pass, where nobody says how many
GUESSED_ROWS = 32  # the pass that a first guess of costs is made for


def predicted_pass(job: Prepared) -> PassForecast:
    """A pass as this machine would run it."""
    forecaster = forecaster_of(job)
    return forecaster.plain() if job.draft is None else forecaster.best(nodes_of(job.config))


def free_nodes(job: Prepared) -> int:
    """How many tree nodes of a pass are computed in the time that reading takes anyway; at least 128, at most 512."""
    forecaster = forecaster_of(job)
    counts = range(MOST_NODES, LEAST_NODES, -NODES_STEP)
    return next((n for n in counts if forecaster.of_rows(n).compute_s <= forecaster.read_s), LEAST_NODES)


def draft_pays(job: Prepared) -> bool | None:
    """Whether the plan expects more tokens per second with the draft; None where there is none."""
    if job.draft is None:
        return None
    predicted, plain = predicted_pass(job), predicted_pass(job.without_draft())
    return predicted.rows > 1 and predicted.tokens_per_second > plain.tokens_per_second


def sharing(job: Prepared) -> dict[str, int]:
    """What requests share: how many there may be, of how many tokens together, and what each token takes."""
    config, models = job.config, [(job.target, target_dtype(job.config))]
    if job.draft is not None:
        models.append((job.draft, draft_dtype(config, job.draft)))
    return {
        "max_requests": max_requests(config, job.layout),
        "text_tokens": text_rows(config, job.context) - 1,
        "bytes_per_token": sum(kv_bytes(model.config, 1, WIDTHS[dtype]) for model, dtype in models),
        "max_nodes": nodes_of(config) if job.draft is not None else 0,
    }


def forecast(job: Prepared) -> dict[str, Any]:
    """The plan as numbers: what each part takes, what is pinned and streamed, the predicted pass."""
    predicted = predicted_pass(job)
    return {
        "parts": dict(job.memory.rows()),
        "total_bytes": job.memory.total_bytes,
        "memory_cap_bytes": job.memory.cap_bytes,
        "target_bytes": job.target.total_bytes,
        "pinned": list(job.memory.pinned),
        "streamed": list(job.memory.streamed),
        "bytes_per_pass": job.memory.bytes_per_pass,
        "bytes_per_prompt": job.memory.bytes_per_prompt,
        **sharing(job),
        "rows_per_pass": predicted.rows,
        "read_seconds_per_pass": predicted.read_s,
        "compute_seconds_per_pass": predicted.compute_s,
        "seconds_per_pass": predicted.seconds,
        "drafting_seconds_per_pass": predicted.drafting_s,
        "tokens_per_pass_assumed": predicted.tokens,
        "tokens_per_second": predicted.tokens_per_second,
        "seconds_per_token": predicted.seconds_per_token,
        "seconds_per_token_without_draft": predicted_pass(job.without_draft()).seconds_per_token,
        "draft_pays": draft_pays(job),
        "is_measured": predicted.is_measured,
        "measured": str(figures_of(job) or ""),
    }


def figures_of(job: Prepared) -> Figures | None:
    """What `llmcad doctor` found on this machine, and when; None: nothing yet."""
    return figures_for(job.target.path)


def idle_draft(job: Prepared) -> tuple[str, ...]:
    """A notice of a draft that is not expected to make anything faster."""
    if draft_pays(job) is not False:
        return ()
    with_draft, without = (predicted_pass(each).seconds_per_token for each in (job, job.without_draft()))
    if with_draft < SHORTEST_S:
        return ()
    return (
        f"the plan expects nothing of the draft: {with_draft:.2g} s a token with it, {without:.2g} without; "
        f"--draft none frees {format_size(job.draft_bytes)}",
    )


def draft_memory_share(job: Prepared) -> float:
    """How much shorter a plain pass gets when the draft has ended, and its memory holds layers: 0.1 is a tenth."""
    later = job.pinned_later
    if not later:
        return 0.0
    read = job.memory.bytes_per_pass - sum(spec.nbytes for spec in job.layout.shards if spec.name in later)
    relieved = replace(job, memory=replace(job.memory, bytes_per_pass=read))
    return 1 - forecaster_of(relieved).plain().seconds / forecaster_of(job).plain().seconds


def first_costs(job: Prepared) -> CostModel:
    """What is known of costs before anything has run."""
    forecaster = forecaster_of(job)
    (read_s, compute_s), (_, plain_s) = forecaster.of_rows(GUESSED_ROWS).halves, forecaster.plain().halves
    return CostModel(
        window_share=_window_share(job),
        draft_step_s=forecaster.draft_step_s,
        read_s=read_s,
        mean_rows=GUESSED_ROWS,
        mean_compute_s=compute_s,
        overlaps=job.reads_ahead,
        plain_compute_s=plain_s,
        draft_memory_share=draft_memory_share(job),
    )


def forecaster_of(job: Prepared) -> Forecaster:
    """Passes of the job's target, and what a step of its draft takes."""
    config, stored = job.config, stored_bytes(job.target)
    forecaster = Forecaster.of(
        job.target.path,
        read_bytes=job.memory.bytes_per_pass,
        read_limit=parse_rate(config.read_limit) if config.read_limit else None,
        parameters=job.target.total_bytes // stored,
        dtype=target_dtype(config),
        overlaps=job.reads_ahead,
        stored_bytes=stored,
    )
    hidden_s = _window_share(job) * forecaster.read_s
    return replace(forecaster, draft_step_s=_draft_step_s(job), hidden_s=hidden_s)


def _window_share(job: Prepared) -> float:
    """Part of a pass's streamed bytes that are read while the draft works."""
    if not job.reads_ahead:
        return 0.0
    per_pass = job.memory.bytes_per_pass
    return min(1.0, job.memory.window_bytes / per_pass) if per_pass else 1.0


def _draft_step_s(job: Prepared) -> float:
    """Its weights are held in the type that it computes in."""
    if job.draft is None:
        return 0.0
    dtype = draft_dtype(job.config, job.draft)
    parameters = job.draft.total_bytes // stored_bytes(job.draft)
    forecaster = Forecaster.of(
        job.target.path,
        read_bytes=0,
        read_limit=None,
        parameters=parameters,
        dtype=dtype,
        stored_bytes=WIDTHS[dtype],
    )
    return forecaster.plain().compute_s
