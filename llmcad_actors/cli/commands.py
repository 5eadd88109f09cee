"""The `llmcad` command: parses, prints, nothing else.

What is slow to import is imported by the command that needs it: help and completion come at once.
"""

import functools
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec

import typer
from rich.console import Console
from typer.core import TyperGroup

from llmcad_actors.cli import output
from llmcad_actors.cli.caches import add_cache_commands
from llmcad_actors.cli.demo import demo_to_plan, made_demo
from llmcad_actors.cli.examples import epilog
from llmcad_actors.cli.interruption import exit_code, told_by
from llmcad_actors.cli.notices import tell
from llmcad_actors.cli.options import (
    MODEL,
    OUTPUT,
    RESOURCES,
    AsJson,
    Chat,
    CheckLossless,
    MaxNewTokens,
    Quiet,
    Stop,
    Threads,
    TraceFile,
    job_of,
    takes_job,
    unsampled,
)
from llmcad_actors.cli.prompt import STANDARD_INPUT, PromptCommand, prompt_text
from llmcad_actors.core.checks import check_text
from llmcad_actors.core.sizes import parse_file_size
from llmcad_actors.errors import ConfigError, LlmcadError
from llmcad_actors.plan.prompt import check_prompt
from llmcad_actors.plan.shorthand import DEMO_MEMORY
from llmcad_actors.tools.bundled import DEMO

if TYPE_CHECKING:
    from llmcad_actors.plan.job import Prepared


class Commands(TyperGroup):
    """All commands; the two options for completion stand apart in the help."""

    def get_params(self, ctx: Any) -> list[Any]:
        params = super().get_params(ctx)
        for param in params:
            if param.name in ("install_completion", "show_completion"):
                vars(param)["rich_help_panel"] = "Completion in the shell"
        return params


app = typer.Typer(
    cls=Commands,
    help="Run language models bigger than the memory you give them, with exactly the model's own output.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
screen = Console(stderr=True)
P = ParamSpec("P")

DEMO_PROMPT = "def read_lines(path):\n    "
RUN, MACHINE, FILES = "Run models", "This machine", "Files"


def reports_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Our errors become one paragraph on standard error and an exit code, never a traceback."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except LlmcadError as error:
            screen.print(f"llmcad: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            screen.print(f"llmcad: {told_by()}", markup=False)
            raise typer.Exit(exit_code()) from None

    return run


def show_version(is_asked: bool) -> None:
    if is_asked:
        from llmcad_actors.machine.versions import summary

        output.write(summary() + "\n")
        raise typer.Exit


@app.callback(epilog=epilog("llmcad"))
def llmcad(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=show_version, help="Show the versions and exit.")
    ] = False,
) -> None:
    """Run language models bigger than the memory you give them, with exactly the model's own output."""


@app.command(cls=PromptCommand, epilog=epilog("generate"), rich_help_panel=RUN)
@reports_errors
@takes_job
def generate(
    make_job: Callable[[], "Prepared"],
    choices: dict[str, Any],
    prompt: Annotated[
        str, typer.Argument(help="Text to continue, or `-` to read it from standard input.")
    ] = STANDARD_INPUT,
    max_new_tokens: MaxNewTokens = 128,
    stop: Stop = None,
    chat: Chat = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    trace: TraceFile = None,
    check_lossless: CheckLossless = False,
) -> None:
    """Continue a text with a model bigger than the memory cap; the text streams as it is accepted."""
    from llmcad_actors.requests.options import choosing_of
    from llmcad_actors.trace.file import check_writable

    check_writable(trace)
    choosing_of(choices)  # what cannot be is refused here
    for name, given in (("the prompt", prompt), *(("--stop", each) for each in stop or ())):
        check_text(given, name)
    job = make_job()
    if check_lossless and job.draft is None:
        raise ConfigError("--check-lossless decodes again without the draft, and there is none; give one with --draft")
    text = prompt_text(prompt)
    if not (text or chat):  # refused before anything starts, if at all
        job.opening()
    tell((*check_prompt(job, text, max_new_tokens, chat=chat), *unsampled(job, choices)))
    from llmcad_actors.cli.runs import run_generate

    options = {"max_new_tokens": max_new_tokens, "stop": stop or (), "chat": chat, "trace": trace, **choices}
    if not run_generate(job, text, as_json=as_json, quiet=quiet, checks=check_lossless, **options):
        raise typer.Exit(1)


@app.command(epilog=epilog("batch"), rich_help_panel=RUN)
@reports_errors
@takes_job
def batch(
    make_job: Callable[[], "Prepared"],
    choices: dict[str, Any],
    file: Annotated[Path, typer.Argument(help='Prompts, a JSON object a line: {"prompt": ..., "id": ..., options}.')],
    out: Annotated[Path, typer.Option(help="Results, a JSON object a line; what it holds already is not run again.")],
    max_new_tokens: MaxNewTokens = 128,
    stop: Stop = None,
    chat: Chat = False,
    quiet: Quiet = False,
) -> None:
    """Continue many texts: passes over the target are shared, and results are kept as they come."""
    from llmcad_actors.batch.files import read_lines
    from llmcad_actors.cli.batch import defaults_of, run_lines

    defaults = defaults_of(max_new_tokens=max_new_tokens, stop=stop, chat=chat or None, **choices)
    lines = read_lines(file, defaults)
    job = make_job()
    tell(unsampled(job, choices))
    if not run_lines(job, lines, out, quiet=quiet):
        raise typer.Exit(1)


@app.command(epilog=epilog("plan"), rich_help_panel=RUN)
@reports_errors
@partial(takes_job, make_demo=demo_to_plan)
def plan(job: "Prepared", as_json: AsJson = False) -> None:
    """Show how the memory cap is split, what is pinned and what is streamed. Starts nothing."""
    from llmcad_actors.plan.admission import shortage

    if (short := shortage(job)) is not None:
        tell([f"it could not be started now: {short}"])
    from llmcad_actors.plan.prediction import forecast  # here: help needs no numpy

    if as_json:
        output.write(json.dumps(forecast(job)) + "\n")
    else:
        from llmcad_actors.cli.views import plan_table

        output.show(plan_table(job))


@app.command(epilog=epilog("demo"), rich_help_panel=RUN)
@reports_errors
def demo(
    size: Annotated[
        str, typer.Option(help="Size of the enlarged target; made once, in the cache.", rich_help_panel=MODEL)
    ] = "2.5GB",
    memory: Annotated[str, typer.Option(help="Cap on all memory used.", rich_help_panel=RESOURCES)] = DEMO_MEMORY,
    threads: Threads = None,
    max_new_tokens: MaxNewTokens = 96,
    plain_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens to generate without speculation.", rich_help_panel=OUTPUT)
    ] = 6,
    prompt: Annotated[str, typer.Option(help="Text to continue.", rich_help_panel=OUTPUT)] = DEMO_PROMPT,
    as_json: AsJson = False,
    trace: TraceFile = None,
) -> None:
    """Run the bundled model, enlarged beyond the memory cap, with speculation and without, and compare."""
    from llmcad_actors.trace.file import check_writable

    check_writable(trace)
    check_text(prompt, "--prompt")
    size_bytes = parse_file_size(size, "the demo's --size")
    given = {"target": DEMO, "memory": memory} | ({"threads": threads} if threads else {})
    job = job_of(given, lambda: made_demo(size_bytes))
    tell(check_prompt(job, prompt, max_new_tokens))
    from llmcad_actors.cli.runs import run_demo

    is_same = run_demo(
        job, prompt, max_new_tokens=max_new_tokens, plain_tokens=plain_tokens, as_json=as_json, trace=trace
    )
    if not is_same:
        raise typer.Exit(1)


@app.command(epilog=epilog("doctor"), rich_help_panel=MACHINE)
@reports_errors
def doctor(
    path: Annotated[
        Path | None, typer.Option(help="A checkpoint, whose files are read, or a folder to test; default: the cache.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Measure less: seconds instead of a minute.")] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Keep what is measured, also if the machine was quieter before.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check this machine, and measure its disk and cores. Exit code 1: something stops llmcad from running."""
    from rich.progress import Progress, TaskID

    from llmcad_actors.doctor.examine import examine
    from llmcad_actors.doctor.views import tables

    with Progress(console=screen, redirect_stdout=False, transient=True, disable=not screen.is_terminal) as bar:
        bars: dict[str, TaskID] = {}

        def say(what: str, share: float | None) -> None:  # without a share the bar only pulses
            for old in bars.keys() - {what}:
                bar.remove_task(bars.pop(old))
            if what not in bars:
                bars[what] = bar.add_task(what, total=None if share is None else 1.0)
            bar.update(bars[what], completed=share)

        report = examine(path, quick=quick, replace=replace, say=say)
    if as_json:
        output.write(json.dumps(report.as_dict()) + "\n")
    else:
        for table in tables(report):
            output.show(table)
    if not report.is_fit:
        raise typer.Exit(1)


add_cache_commands(app, MACHINE, reports_errors)


@app.command("convert", epilog=epilog("convert"), rich_help_panel=FILES)
@reports_errors
def convert_model(
    source: Annotated[Path, typer.Argument(help="Model directory with pytorch_model.bin files.")],
    out: Annotated[Path, typer.Argument(help="Directory to make; run again to go on after an interruption.")],
    memory: Annotated[str, typer.Option(help="Cap on the memory used.")] = "2GB",
    dtype: Annotated[str, typer.Option(help="Store as: auto (as it is), float32, bfloat16, float16.")] = "auto",
) -> None:
    """Turn a pickled checkpoint (pytorch_model.bin) into safetensors, which llmcad can run. Runs no code of it."""
    from rich.progress import Progress

    from llmcad_actors.tools.convert import convert  # here: it needs torch, and no other command does

    with Progress(console=screen, redirect_stdout=False, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task(f"converting {source.name}", total=None)
        made = convert(
            source,
            out,
            memory=memory,
            dtype=dtype,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    output.write(f"{made}\n")


@app.command("trace", epilog=epilog("trace"), rich_help_panel=FILES)
@reports_errors
def show_trace(
    file: Annotated[Path, typer.Argument(help="What `--trace` wrote.")],
    out: Annotated[Path | None, typer.Option(help="Write a timeline for Perfetto or chrome://tracing (JSON).")] = None,
    png: Annotated[Path | None, typer.Option(help="Draw the timeline (needs matplotlib).")] = None,
    tree: Annotated[int | None, typer.Option(help="Print the token tree of this pass; the first is 1.")] = None,
) -> None:
    """Look at a trace: a summary, or a timeline, a picture, the token tree of one pass."""
    from llmcad_actors.trace.file import read_trace
    from llmcad_actors.trace.picture import draw
    from llmcad_actors.trace.views import summary_table, token_tree, write_chrome

    trace = read_trace(file)
    if out is not None:
        write_chrome(trace, out)
    if png is not None:
        draw(trace, png)
    if tree is not None:
        output.show(token_tree(trace, tree))
    if (out, png, tree) == (None, None, None):
        output.show(summary_table(trace))
