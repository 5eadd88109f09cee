"""What does each memory cap cost in time, and is it kept? One run per cap, each in a process of its own.

    python -m benchmarks.memory [--target demo] [--caps 1300MB,1500MB,2GB] [--tokens 64]
    python -m benchmarks.memory --vocabularies 32k,128k,256k [--kinds bpe,unigram]

The second form asks the same of tiny models with large vocabularies (`vocabularies.py`), with a draft and without, at
the smallest cap that is accepted and at twice that; every tree is as large as it may be.

Peaks are proportional set sizes, sampled, with the object store counted once. Where a memory cgroup can be made (as
root), the run lives inside one whose hard limit is the cap, and the kernel's own peak stands beside them: page cache
included, so it comes close to the cap by nature; what it shows is that nothing was killed.

"Overhead" is the peak less all planned parts but the runtime: caches of a context that is not used up make it look
smaller. `--max-context` with little more than prompt and tokens shows it as it is.
"""

import itertools
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.cgroups import MemoryCgroup, memory_cgroup
from benchmarks.common import emit, measurement, model_paths
from benchmarks.memory_run import NO_DRAFT
from benchmarks.vocabularies import pair
from llmcad_actors.cli.commands import reports_errors
from llmcad_actors.config import EngineConfig
from llmcad_actors.core.budget import format_size, parse_size, smallest_cap
from llmcad_actors.machine.limits import memory_limit
from llmcad_actors.plan.footprint import budget_inputs
from llmcad_actors.plan.prepare import prepare

screen = Console(stderr=True)
TABLE_WIDTH = 120
NUM_CAPS = 6
MB = 10**6


def default_caps(config: EngineConfig) -> list[int]:
    """From the least that works to where all layers are pinned, evenly; no more than this machine has."""
    roomy = prepare(replace(config, memory="100%"))
    least = smallest_cap(budget_inputs(config, roomy.target, roomy.layout, roomy.draft, roomy.context))
    most = min(least + roomy.target.total_bytes, memory_limit().limit_bytes)
    caps = (least + (most - least) * step // (NUM_CAPS - 1) for step in range(NUM_CAPS))
    return [-(-cap // MB) * MB if cap < most else cap for cap in caps]


@contextmanager
def cgroup_where_possible(limit_bytes: int) -> Iterator[MemoryCgroup | None]:
    """None, and a word on standard error, where this user may not make one."""
    with ExitStack() as stack:
        try:
            cgroup = stack.enter_context(memory_cgroup(limit_bytes))
        except OSError as error:
            screen.print(f"no memory cgroup can be made ({error}): peaks are sampled only", style="dim")
            cgroup = None
        yield cgroup


def run(
    paths: tuple[str, str],
    cap: int,
    tokens: int,
    context: int,
    timeout_s: float,
    *,
    hard: bool,
    fallback: str = "marginal",
) -> dict[str, Any]:
    """One cap; `killed` where the run broke under the hard limit, and is then made again without."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        out = Path(folder) / "figures.json"
        numbers = [str(number) for number in (cap, tokens, context)]
        command = [sys.executable, "-m", "benchmarks.memory_run", *paths, *numbers, fallback, str(out)]
        cgroup = stack.enter_context(cgroup_where_possible(cap)) if hard else None
        done = subprocess.run(
            cgroup.command(command) if cgroup else command, stdout=subprocess.DEVNULL, timeout=timeout_s
        )
        kernel = {
            "cgroup_limit_bytes": cap if cgroup else None,
            "cgroup_peak_bytes": cgroup.peak_bytes() if cgroup else None,
            "oom_kills": cgroup.oom_kills() if cgroup else None,
        }
        if done.returncode == 0:
            return {**json.loads(out.read_text()), **kernel, "killed": False}
    if not hard or not kernel["oom_kills"]:
        raise SystemExit(f"the run under {format_size(cap)} broke with exit code {done.returncode}; see above")
    screen.print(f"{format_size(cap)}: killed under the hard limit; again without", style="yellow")
    again = run(paths, cap, tokens, context, timeout_s, hard=False, fallback=fallback)
    return {**again, **kernel, "killed": True}


def values_of(figures: Mapping[str, Any], reference: Sequence[int] | None) -> dict[str, Any]:
    """For the JSON line: the tokens become a comparison with the first run's."""
    values = {key: value for key, value in figures.items() if key != "token_ids"}
    if "token_ids" in figures:
        values["same_output"] = reference is None or list(figures["token_ids"]) == list(reference)
    return values


def table_of(lines: Sequence[Mapping[str, Any]], title: str) -> Table:
    table = Table(title=title)
    columns = ("cap", "peak", "in cgroup", "overhead", "pinned", "s/token", "s/pass", "tokens/pass", "same output")
    for column in columns:
        table.add_column(column, justify="right")
    for line in lines:
        if "refused" in line:
            table.add_row(format_size(line["config"]["memory_cap_bytes"]), "refused")
            continue
        peak = line["cgroup_peak_bytes"]
        table.add_row(
            format_size(line["memory_cap_bytes"]),
            format_size(line["peak_bytes"]),
            "killed" if line["killed"] else format_size(peak) if peak else "",
            format_size(line["overhead_bytes"]),
            format_size(line["pinned_bytes"]),
            f"{line['seconds_per_token']:.3f}",
            f"{line['seconds_per_pass']:.2f}",
            f"{line['tokens_per_pass']:.1f}",
            "yes" if line["same_output"] else "NO",
        )
    return table


def group_table(lines: Sequence[Mapping[str, Any]]) -> Table:
    """What uses how much when all of it together uses most."""
    measured = [line for line in lines if "peak_by_group" in line]
    table = Table(title="at the peak, MB")
    table.add_column("cap")
    for line in measured:
        table.add_column(format_size(line["memory_cap_bytes"]), justify="right")
    for group in measured[0]["peak_by_group"] if measured else ():
        table.add_row(group, *(f"{line['peak_by_group'][group] / 1e6:.0f}" for line in measured))
    return table


def least_cap(paths: tuple[str, str], context: int | None) -> int:
    """The smallest cap that is accepted, in whole megabytes."""
    draft = None if paths[1] == NO_DRAFT else paths[1]
    job = prepare(EngineConfig(target=paths[0], draft=draft, memory="100%", max_context=context, fallback="full-tree"))
    return -(-job.least_bytes // MB) * MB


def vocabulary_line(kind: str, size: int, draft: bool, factor: int, tokens: int, **options: Any) -> dict[str, Any]:
    """One run of a tiny model with a large vocabulary under `factor` times the smallest cap."""
    target, small = pair(kind, size)
    paths = (str(target), str(small) if draft else NO_DRAFT)
    cap = factor * least_cap(paths, None)
    screen.print(f"{kind}, {size} entries, {'a' if draft else 'no'} draft, {format_size(cap)} ...", style="dim")
    settings = {"kind": kind, "vocabulary": size, "draft": draft, "memory_cap_bytes": cap, "tokens": tokens}
    figures = run(paths, cap, tokens, 0, fallback="full-tree", **options)
    state = "O_DIRECT: the page cache is not used for weights"
    return measurement("memory of a vocabulary", values_of(figures, None), config=settings, cache_state=state, seed=0)


def vocabulary_table(lines: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="tiny models with large vocabularies")
    for column in ("tokenizer", "draft", "cap", "plan", "peak", "of plan", "in cgroup", "takes", "kept"):
        table.add_column(column, justify="right")
    for line in lines:
        config, peak, plan = line["config"], line["peak_bytes"], line["planned_bytes"]
        table.add_row(
            f"{config['kind']} {config['vocabulary']}",
            "yes" if config["draft"] else "no",
            format_size(config["memory_cap_bytes"]),
            format_size(plan),
            format_size(peak),
            f"{peak / plan:.0%}",
            "killed" if line["killed"] else format_size(line["cgroup_peak_bytes"] or 0),
            format_size(line["tokenizer_bytes"]),
            "yes" if peak <= config["memory_cap_bytes"] and not line["killed"] else "NO",
        )
    return table


def parse_count(text: str) -> int:
    """ "32k" -> 32000."""
    return int(text.lower().removesuffix("k")) * (1000 if text.lower().endswith("k") else 1)


def sweep_vocabularies(
    vocabularies: str, kinds: str, tokens: int, timeout_s: float, out: Path | None, *, hard: bool
) -> None:
    """Every kind, every size, with a draft and without, at the smallest cap and at twice that. Exit code 1: broken."""
    lines = []
    for size, kind in itertools.product(map(parse_count, vocabularies.split(",")), kinds.split(",")):
        for draft, factor in itertools.product((True, False), (1, 2)):
            lines.append(vocabulary_line(kind, size, draft, factor, tokens, timeout_s=timeout_s, hard=hard))
            emit(lines[-1], out)
    Console(width=None if sys.stdout.isatty() else TABLE_WIDTH).print(vocabulary_table(lines))
    if any(line["peak_bytes"] > line["config"]["memory_cap_bytes"] or line["killed"] for line in lines):
        raise typer.Exit(1)


def draw(lines: Sequence[Mapping[str, Any]], title: str, png: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    measured = [line for line in lines if "peak_bytes" in line]
    caps = [line["memory_cap_bytes"] / 1e9 for line in measured]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(caps, [line["seconds_per_token"] for line in measured], "o-", color="#4c78a8", label="per token")
    axes.plot(caps, [line["seconds_per_pass"] for line in measured], "s--", color="#f58518", label="per pass")
    axes.set(xlabel="memory cap, GB", ylabel="seconds", title=title)
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(png, dpi=150)


@reports_errors
def main(
    target: Annotated[str, typer.Option(help="Model directory, `demo` or `bundled`.")] = "demo",
    draft: Annotated[str | None, typer.Option(help="Draft directory, `none`; default: the bundled one.")] = None,
    caps: Annotated[
        str | None, typer.Option(help="Caps, such as 1300MB,1.5GB; default: six, from the least on.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="New tokens per cap.")] = 64,
    max_context: Annotated[int | None, typer.Option(help="Tokens to plan for; default: as the engine.")] = None,
    hard: Annotated[bool, typer.Option(help="Run inside a cgroup limited to the cap, where one can be made.")] = True,
    timeout: Annotated[float, typer.Option(help="Seconds that one cap may take.")] = 1800.0,
    out: Annotated[Path | None, typer.Option(help="Append JSON lines here; default: print them.")] = None,
    png: Annotated[Path | None, typer.Option(help="Draw seconds against the cap.")] = None,
    vocabularies: Annotated[
        str | None, typer.Option(help="Sizes, such as 32k,128k,256k: tiny models with such vocabularies instead.")
    ] = None,
    kinds: Annotated[str, typer.Option(help="Of --vocabularies: the tokenizers' kinds.")] = "bpe,unigram",
) -> None:
    """Sweep the memory cap; prints a JSON line for each, and tables."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # the cgroup goes, with what is in it
    if vocabularies is not None:
        return sweep_vocabularies(vocabularies, kinds, tokens, timeout, out, hard=hard)
    model, small = model_paths(target, draft)
    paths = (str(model), NO_DRAFT if draft == NO_DRAFT else str(small))
    small_path = None if paths[1] == NO_DRAFT else paths[1]
    config = EngineConfig(target=paths[0], draft=small_path, max_context=max_context)
    sizes = [parse_size(text, memory_limit().limit_bytes) for text in caps.split(",")] if caps else default_caps(config)
    lines: list[dict[str, Any]] = []
    reference: list[int] | None = None
    for cap in sizes:
        screen.print(f"{format_size(cap)} ...", style="dim")
        figures = run(paths, cap, tokens, max_context or 0, timeout, hard=hard)
        settings = {"target": target, "draft": draft, "memory_cap_bytes": cap, "tokens": tokens, "hard": hard}
        settings["max_context"] = max_context
        lines.append(
            measurement(
                "memory",
                values_of(figures, reference),
                config=settings,
                cache_state="O_DIRECT: the page cache is not used for weights",
            )
        )
        emit(lines[-1], out)
        reference = reference or figures.get("token_ids")
    console = Console(width=None if sys.stdout.isatty() else TABLE_WIDTH)
    console.print(table_of(lines, f"{target}, {tokens} tokens"))
    console.print(group_table(lines))
    if png is not None:
        draw(lines, f"{target}: what a memory cap costs", png)


if __name__ == "__main__":
    typer.run(main)
