"""Is a run with a draft ever slower than one without, under the same cap? With good drafts, equal and random ones.

    python -m benchmarks.never_slower [--only bundled,equal,random] [--runs 3] [--tokens 96]

Engines with the draft and with none take turns, each newly started: nothing is known of the draft at its first request.
`ratio` is the time per token with the draft by that without, run by run: of the first request, and of those after it.
Above 1.05 the draft made it slower.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import real_model
from benchmarks.common import Spread, emit, measurement
from benchmarks.workload import read_prompts
from llmcad_actors.cli.commands import reports_errors
from llmcad_actors.engine import Engine
from llmcad_actors.errors import ConfigError
from llmcad_actors.machine.cache import cache_folder
from llmcad_actors.results import Result
from llmcad_actors.tools.bundled import bundled_draft, demo_target

IN_MEMORY, STREAMED = "5GB", "1.5GB"


@dataclass(frozen=True, slots=True)
class Case:
    """A pair, and the cap for both runs."""

    target: Callable[[], Path]
    draft: Callable[[], Path]
    memory: str


def random_small_draft() -> Path:
    """The bundled draft's shape, with random weights."""
    return real_model.randomised(bundled_draft, cache_folder() / "draft-random")


CASES: Mapping[str, Case] = {
    "bundled": Case(demo_target, bundled_draft, IN_MEMORY),
    "equal": Case(demo_target, demo_target, "8GB"),
    "random": Case(demo_target, random_small_draft, IN_MEMORY),
    "bundled-streamed": Case(demo_target, bundled_draft, STREAMED),
    "random-streamed": Case(demo_target, random_small_draft, STREAMED),
    "real-4bit": Case(real_model.target, lambda: real_model.draft(4), "3GB"),
    "real-equal": Case(real_model.target, real_model.target, "3GB"),
    "real-random": Case(real_model.target, real_model.random_draft, "3GB"),
    "real-4bit-streamed": Case(real_model.large, lambda: real_model.draft(4), "2GB"),
    "real-random-streamed": Case(real_model.large, real_model.random_draft, "2GB"),
}


def requests(target: Path, draft: Path | None, memory: str, prompts: Sequence[str], tokens: int) -> list[Result]:
    """The prompts, one after the other, through a new engine."""
    with Engine.launch(target=str(target), draft=draft and str(draft), memory=memory, max_context=1024) as engine:
        return [engine.generate(prompt, max_new_tokens=tokens) for prompt in prompts]


def seconds_per_token(results: Sequence[Result]) -> float:
    return sum(r.stats.seconds for r in results) / sum(r.stats.new_tokens for r in results)


def measure(case: Case, runs: int, prompts: Sequence[str], tokens: int) -> dict[str, Any]:
    """Both kinds of runs in turns; what goes into the JSON line."""
    target, draft = case.target(), case.draft()
    plain, drafted = list[list[Result]](), list[list[Result]]()
    for _ in range(runs):
        plain.append(requests(target, None, case.memory, prompts, tokens))
        drafted.append(requests(target, draft, case.memory, prompts, tokens))
    values: dict[str, Any] = {}
    for name, part in (("first_request", slice(1)), ("later_requests", slice(1, None))):
        with_draft, without = ([seconds_per_token(run[part]) for run in each] for each in (drafted, plain))
        values[name] = {
            "ratio": Spread.of([a / b for a, b in zip(with_draft, without, strict=True)]).as_dict(),
            "seconds_per_token": Spread.of(with_draft).as_dict(),
            "seconds_per_token_without": Spread.of(without).as_dict(),
        }
    stats = [result.stats for run in drafted for result in run]
    ids, expected = ([[result.token_ids for result in run] for run in each] for each in (drafted, plain))
    return values | {
        "tokens_per_pass": sum(s.new_tokens for s in stats) / sum(s.target_passes for s in stats),
        "undrafted_share": sum(s.undrafted_passes for s in stats) / sum(s.target_passes for s in stats),
        "texts_that_differ": sum(a != b for a, b in zip(ids, expected, strict=True)),
    }


@reports_errors
def main(
    only: Annotated[str, typer.Option(help="Cases, with commas between them; default: all.")] = ",".join(CASES),
    runs: Annotated[int, typer.Option(min=1, help="Runs of each kind, in turns.")] = 3,
    prompts: Annotated[int, typer.Option(min=2, help="Requests to each engine.")] = 3,
    tokens: Annotated[int, typer.Option(min=1, help="New tokens of each.")] = 96,
    out: Annotated[Path | None, typer.Option(help="Append the JSON lines here instead of printing them.")] = None,
) -> None:
    """With a draft and without, in turns; a JSON line for each case."""
    unknown = set(only.split(",")) - set(CASES)
    if unknown:
        raise ConfigError(f"--only: there is no {', '.join(sorted(unknown))}; known are {', '.join(CASES)}")
    for name in only.split(","):
        values = measure(CASES[name], runs, read_prompts(prompts), tokens)
        config = {"case": name, "memory": CASES[name].memory, "prompts": prompts, "tokens": tokens}
        emit(measurement("never_slower", values, config=config, cache_state="O_DIRECT, or all in memory"), out)


if __name__ == "__main__":
    typer.run(main)
