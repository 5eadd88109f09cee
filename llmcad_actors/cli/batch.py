"""`llmcad batch`: prompts from a file, results to another, and how far it is."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from llmcad_actors.batch.files import Line, Results
from llmcad_actors.batch.run import Progress, run_batch
from llmcad_actors.cli.notices import tell
from llmcad_actors.cli.runs import running, say
from llmcad_actors.cli.status import format_seconds, speed
from llmcad_actors.engine import Engine
from llmcad_actors.plan.footprint import max_requests
from llmcad_actors.plan.job import Prepared

WAITING = 2  # for each place: who joins the next pass is there when a place gets free


def run_lines(job: Prepared, lines: list[Line], out: Path, *, quiet: bool) -> bool:
    """Run what `out` has no text of; False where a line could not be run."""
    with Results(out) as results:
        left = [line for line in lines if line.id not in results.done]
        if len(left) < len(lines) and not quiet:
            tell([f"{len(lines) - len(left)} of {len(lines)} are in {out} already, and left out"])
        if not left:
            return True
        try:
            with running(job, as_json=False, quiet=quiet) as (engine, line, _):
                line.end()
                ended = follow(engine, left, results, quiet=quiet)
        except KeyboardInterrupt:
            tell([f"what has ended is in {out}; the same command goes on from there"])
            raise
    return not ended.failed


def follow(engine: Engine, lines: list[Line], results: Results, *, quiet: bool) -> Progress:
    screen = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
    )
    most = max_requests(engine.prepared.config, engine.prepared.layout)
    at_once = min(WAITING * most, most + engine.prepared.config.max_queue)
    hides = quiet or not screen.is_terminal
    with Bars(*columns, console=screen, redirect_stdout=False, transient=True, disable=hides) as bars:
        task = bars.add_task("texts", total=len(lines), figures="")

        def show(now: Progress) -> None:
            seconds = bars.tasks[0].elapsed or 0.0
            figures = f"{speed(now.tokens, seconds)} tokens/s | {now.in_flight} in flight"
            bars.update(task, completed=now.done + now.failed, figures=figures)

        ended = run_batch(engine, lines, results.add, show, at_once=at_once)
        seconds = bars.tasks[0].elapsed or 0.0
    if not quiet:
        failed = f", {ended.failed} could not be run" if ended.failed else ""
        rate = speed(ended.tokens, seconds)
        say(
            f"{ended.done} texts, {ended.tokens} tokens in {format_seconds(seconds)}: {rate} tokens/s{failed}",
            style="dim",
        )
    return ended


def defaults_of(**options: Any) -> dict[str, Any]:
    """What lines have where they do not say otherwise."""
    return {name: value for name, value in options.items() if value is not None}
