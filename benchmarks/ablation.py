"""What does each technique bring? One target, the same texts, one engine setting after the other.

    python -m benchmarks.ablation [--prompts 16] [--tokens 128] [--read-limit 400MB/s] [--only sp,ours]
    python -m benchmarks.ablation --large --memory 1.6GB [--draft 4bit|3bit|random] [--questions FILE]

The target is the demo's, or the published model, enlarged to be bigger than the cap.

Every configuration is a set of engine settings and nothing else; all of them give the target's own text, and the
benchmark counts where one does not. What needs no draft runs without it, and may pin layers in its place; as all its
passes after the prompt's cost the same, few are measured (`--plain-tokens`), and count for all the others.
"""

import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks import workload
from benchmarks.common import Spread, emit, measurement, screen
from benchmarks.workload import Workload
from llmcad_actors.cli.commands import reports_errors
from llmcad_actors.config import EngineConfig
from llmcad_actors.core.sizes import parse_size
from llmcad_actors.core.stats import Stats
from llmcad_actors.engine import Engine
from llmcad_actors.results import Result
from llmcad_actors.tools.bundled import demo_draft
from llmcad_actors.trace.file import read_trace
from llmcad_actors.trace.views import disk_idle_share

TABLE_WIDTH = 120
DEFAULTS = EngineConfig(target="")


@dataclass(frozen=True, slots=True)
class Setting:
    """A configuration: engine settings under a name."""

    name: str
    title: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    drafts: bool = True


SETTINGS = (
    Setting("std", "Std: plain, no overlap", {"read_ahead": False}, drafts=False),
    Setting("stdpl", "StdPL: plain, reading ahead", drafts=False),
    Setting("sp", "SP: chain of 4", {"fallback": "fixed-depth", "depth": 4, "provisional": False}),
    Setting("specinfer", "SpecInfer: fixed tree", {"fallback": "fixed-tree", "provisional": False}),
    Setting(
        "bld",
        "BLD, lossless: chain, token confidence",
        {"fallback": "token-confidence", "children": 1, "batch": 1, "provisional": False},
    ),
    Setting(
        "paper",
        "LLMCad: pacer, adaptive, provisional",
        {"builder": "pacer", "fallback": "adaptive", "provisional": True},
    ),
    Setting(
        "paper-average",
        "LLMCad, threshold by average",
        {"builder": "pacer", "fallback": "adaptive", "alpha_update": "average", "provisional": True},
    ),
    Setting("ours", "ours"),
    Setting("ours-no-provisional", "ours - provisional growth", {"provisional": False}),
    Setting("ours-no-sharpen", "ours - sharpened draft", {"sharpen": False}),
    Setting("ours-15-nodes", "ours - fallback: always 15 nodes", {"fallback": "full-tree", "max_nodes": 15}),
    Setting("ours-64-nodes", "ours - fallback: always 64 nodes", {"fallback": "full-tree", "max_nodes": 64}),
    Setting("ours-128-nodes", "ours - fallback: always 128 nodes", {"fallback": "full-tree", "max_nodes": 128}),
    Setting("ours-chain", "ours - tree: a chain", {"children": 1, "batch": 1}),
)
BY_NAME = {setting.name: setting for setting in SETTINGS}


@dataclass(frozen=True, slots=True)
class Measured:
    """All prompts under one setting."""

    setting: Setting
    results: tuple[Result, ...]
    seconds_per_token: tuple[float, ...]  # by prompt
    idle_shares: tuple[float, ...]  # of the disk, in steady state

    @property
    def stats(self) -> tuple[Stats, ...]:
        return tuple(result.stats for result in self.results)

    def total(self, name: str) -> float:
        return float(sum(getattr(stats, name) for stats in self.stats))

    def per(self, name: str, of: str) -> float:
        return self.total(name) / (self.total(of) or 1.0)

    @property
    def hit_rate(self) -> float:
        """Share of the rounds with growth ahead that began with a head start."""
        return self.total("provisional_hits") / (self.total("provisional_hits") + self.total("provisional_misses") or 1)

    def _mean_seconds(self) -> float:
        """Per token of all prompts; a prompt counts with its tokens, which are few where passes stand for others."""
        weights = [result.stats.new_tokens for result in self.results]
        return sum(w * s for w, s in zip(weights, self.seconds_per_token, strict=True)) / sum(weights)

    def values(self, reference: Sequence[Result]) -> dict[str, Any]:
        """For the JSON line. `reference`: what the text has to agree with, as far as both go."""
        return {
            "setting": self.setting.name,
            "seconds_per_token": self._mean_seconds(),
            "seconds_per_token_by_prompt": Spread.of(self.seconds_per_token),
            "tokens_per_pass": self.per("new_tokens", "target_passes"),
            "tokens_per_pass_by_prompt": Spread.of([s.tokens_per_pass for s in self.stats]),
            "draft_steps_per_pass": self.per("draft_steps", "target_passes"),
            "nodes_per_pass": self.per("verified_nodes", "target_passes"),
            "hit_rate": self.hit_rate,
            "stall_seconds_per_pass": self.per("stall_seconds", "target_passes"),
            "compute_seconds_per_pass": self.per("compute_seconds", "target_passes"),
            "seconds_per_pass": self.per("seconds", "target_passes"),
            "bytes_read": int(self.total("bytes_read")),
            "peak_memory_bytes": max(stats.peak_memory_bytes for stats in self.stats),
            "pinned_bytes": self.stats[0].pinned_bytes,
            "new_tokens": int(self.total("new_tokens")),
            "texts_that_differ": num_differing(self.results, reference),
            "disk_idle_share": statistics.median(self.idle_shares) if self.idle_shares else None,
        }


def num_differing(results: Sequence[Result], reference: Sequence[Result]) -> int:
    """Prompts whose tokens differ before one of the two texts ends. In bf16 an exact tie may fall either way."""
    pairs = zip(results, reference, strict=False)
    return sum(any(a != b for a, b in zip(one.token_ids, other.token_ids, strict=False)) for one, other in pairs)


def run(
    setting: Setting,
    work: Workload,
    tokens: int,
    plain_tokens: int,
    common: Mapping[str, Any],
    traces: Path | None,
) -> Measured:
    """All prompts on one engine, after a pass that touches what has to be touched."""
    results, seconds, idle = [], [], []
    settings = {**common, **setting.settings}
    with Engine.launch(work.target, work.draft if setting.drafts else None, **settings) as engine:
        generate = partial(engine.generate, chat=work.is_chat)
        generate(work.texts[-1], max_new_tokens=1)
        for number, prompt in enumerate(work.texts, 1):
            screen.print(f"{setting.name}: prompt {number} of {len(work.texts)}", style="dim")
            trace = traces / f"{setting.name}-{number}.trace" if traces else None
            if setting.drafts:
                results.append(generate(prompt, max_new_tokens=tokens, trace=trace))
                seconds.append(results[-1].stats.seconds / results[-1].stats.new_tokens)
            else:
                first = generate(prompt, max_new_tokens=1, speculate=False).stats.seconds
                results.append(generate(prompt, max_new_tokens=plain_tokens, speculate=False, trace=trace))
                next_one = results[-1].stats.seconds / results[-1].stats.new_tokens
                seconds.append((first + (tokens - 1) * next_one) / tokens)
            if trace and (share := disk_idle_share(read_trace(trace))) is not None:
                idle.append(share)
    return Measured(setting, tuple(results), tuple(seconds), tuple(idle))


def table_of(lines: Sequence[Mapping[str, Any]], title: str) -> Table:
    table = Table(title=title)
    table.add_column("", no_wrap=True)
    for column in (
        "seconds per token",
        "against ours",
        "tokens per pass",
        "nodes per pass",
        "draft steps per pass",
        "hit rate",
        "stall s per pass",
    ):
        table.add_column(column, justify="right")
    ours = next((line["seconds_per_token"] for line in lines if line["setting"] == "ours"), None)
    for line in lines:
        table.add_row(
            BY_NAME[line["setting"]].title,
            f"{line['seconds_per_token']:.3f}",
            f"{line['seconds_per_token'] / ours:.2f}x" if ours else "",
            f"{line['tokens_per_pass']:.2f}",
            f"{line['nodes_per_pass']:.0f}",
            f"{line['draft_steps_per_pass']:.1f}",
            f"{line['hit_rate']:.0%}",
            f"{line['stall_seconds_per_pass']:.2f}",
        )
    return table


def draw(lines: Sequence[Mapping[str, Any]], title: str, png: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 0.5 * len(lines) + 1.5), layout="constrained")
    titles = [BY_NAME[line["setting"]].title for line in lines]
    seconds = [line["seconds_per_token"] for line in lines]
    low, high = (
        [abs(line["seconds_per_token_by_prompt"][end] - line["seconds_per_token"]) for line in lines]
        for end in ("min", "max")
    )
    colours = ["#f58518" if line["setting"].startswith("ours") else "#4c78a8" for line in lines]
    bars = axes.barh(titles, seconds, xerr=[low, high], color=colours, ecolor="#888888")
    axes.bar_label(bars, [f" {value:.3f}" for value in seconds])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(xlabel="seconds per token (line: from the best prompt to the worst)", title=title)
    figure.savefig(png, dpi=150)


def chosen(only: str | None) -> list[Setting]:
    if only is None:
        return list(SETTINGS)
    names = [name.strip() for name in only.split(",")]
    unknown = [name for name in names if name not in BY_NAME]
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)}: the settings are {', '.join(BY_NAME)}")
    return [BY_NAME[name] for name in names]


@reports_errors
def main(
    prompts: Annotated[int, typer.Option(min=1, help="How many texts.")] = 16,
    tokens: Annotated[int, typer.Option(min=1, help="New tokens per text.")] = 128,
    plain_tokens: Annotated[int, typer.Option(min=1, help="Passes measured per prompt without a draft.")] = 6,
    only: Annotated[str | None, typer.Option(help=f"Some of: {', '.join(BY_NAME)}.")] = None,
    target: Annotated[str, typer.Option(help="Model directory, `demo` or `bundled`.")] = "demo",
    draft: workload.Draft = None,
    draft_size: Annotated[
        str | None, typer.Option(help="Enlarge the bundled draft to this size: a draft whose steps are dear.")
    ] = None,
    memory: Annotated[str, typer.Option(help="Memory cap.")] = "1.5GB",
    read_limit: Annotated[str | None, typer.Option(help="Hold reads to a rate, such as 400MB/s.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    max_nodes: Annotated[
        int | None, typer.Option(min=1, help="Tree nodes at most, where a setting does not say.")
    ] = DEFAULTS.max_nodes,
    batch: Annotated[int, typer.Option(min=1, help="Nodes of a draft step, likewise.")] = DEFAULTS.batch,
    out: Annotated[Path | None, typer.Option(help="Append JSON lines here; default: print them.")] = None,
    png: Annotated[Path | None, typer.Option(help="Draw the bars.")] = None,
    traces: Annotated[Path | None, typer.Option(help="Keep a trace of every run in this folder.")] = None,
    real: workload.Real = False,
    large: workload.Large = False,
    questions: workload.Questions = None,
) -> None:
    """Run the configurations one after the other; prints a table, and a JSON line for each."""
    if draft_size is not None:
        draft = str(demo_draft(parse_size(draft_size, 0)))
    work = workload.chosen(target, draft, prompts, real=real, large=large, questions=questions)
    settings = chosen(only)
    common = {"memory": memory, "read_limit": read_limit, "dtype": dtype, "max_nodes": max_nodes, "batch": batch}
    if traces is not None:
        traces.mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, Any]] = []
    reference: tuple[Result, ...] = ()
    for setting in settings:
        measured = run(setting, work, tokens, plain_tokens, common, traces)
        config = {
            **common,
            **setting.settings,
            **work.config(),
            "draft_size": draft_size,
            "tokens": tokens,
            "plain_tokens": plain_tokens,
        }
        values = measured.values(reference)
        lines.append(measurement("ablation", values, config=config, cache_state="O_DIRECT: the page cache is not used"))
        emit(lines[-1], out)
        if not reference or len(reference[0].token_ids) < len(measured.results[0].token_ids):
            reference = measured.results
    title = f"{work.target.name}, {memory}, {f'reads held to {read_limit}' if read_limit else 'reads unlimited'}"
    Console(width=None if sys.stdout.isatty() else TABLE_WIDTH).print(table_of(lines, title))
    if png is not None:
        draw(lines, title, png)


if __name__ == "__main__":
    typer.run(main)
