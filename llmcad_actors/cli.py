"""The `llmcad` command: parses, prints, nothing else."""

import functools
import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ParamSpec

import typer
from rich.console import Console
from rich.progress import Progress as RichProgress
from rich.progress import TaskID

from llmcad_actors import command
from llmcad_actors.bundled import DEMO, DEMO_BYTES, bundled_draft, demo_target
from llmcad_actors.cli_views import demo_table, plan_table
from llmcad_actors.config import BUILDERS, FALLBACKS, READINGS, EngineConfig, read_config
from llmcad_actors.core.budget import parse_size
from llmcad_actors.engine import Engine
from llmcad_actors.errors import ConfigError, LlmcadError
from llmcad_actors.interruption import exit_code, told_by
from llmcad_actors.planning import Prepared, prepare
from llmcad_actors.results import Result
from llmcad_actors.shorthand import DEMO_MEMORY, spelled_out
from llmcad_actors.status import StatusLine
from llmcad_actors.trace_file import check_writable, read_trace
from llmcad_actors.trace_picture import draw
from llmcad_actors.trace_views import summary_table, token_tree, write_chrome

app = typer.Typer(
    help="Run language models bigger than the memory you give them, with exactly the model's own output.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
screen = Console(stderr=True)
P = ParamSpec("P")

DEMO_PROMPT = "def read_lines(path):\n    "

Target = Annotated[
    str, typer.Option(help="Model to run: a Hugging Face directory, a name in the local cache, or `demo`.")
]
Draft = Annotated[str, typer.Option(help="Small model with the same tokenizer: directory or name; `none`: no draft.")]
Memory = Annotated[str | None, typer.Option(help="Cap on all that is used: 1.5GB, 512MiB, 75% of RAM.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")]
Stop = Annotated[list[str] | None, typer.Option(help="End the text before this string; may be repeated.")]
Chat = Annotated[bool, typer.Option("--chat", help="Put the model's chat template around the text.")]
Dtype = Annotated[str | None, typer.Option(help="Compute in: auto (as stored), float32, bfloat16.")]
MaxNodes = Annotated[int | None, typer.Option(help="Tree nodes checked in one pass at most.")]
MaxContext = Annotated[int | None, typer.Option(help="Tokens of prompt and output to plan for.")]
AsJson = Annotated[
    bool, typer.Option("--json", help="One JSON object as the last line; nothing else on standard output.")
]
TraceFile = Annotated[
    Path | None, typer.Option("--trace", help="Write what every part does to this file; see `llmcad trace`.")
]
Builder = Annotated[str | None, typer.Option(help=f"How the tree grows: {', '.join(BUILDERS)}.")]
Fallback = Annotated[str | None, typer.Option(help=f"When the draft hands over: {', '.join(FALLBACKS)}.")]
Depth = Annotated[int | None, typer.Option(help="Of fixed-depth: tokens drafted in a row.")]
Widths = Annotated[str | None, typer.Option(help="Of fixed-tree: children at each level, such as 1,1,3,1.")]
Alpha = Annotated[float | None, typer.Option(help="Of adaptive: the first threshold of cumulative confidence.")]
AlphaUpdate = Annotated[
    str | None, typer.Option(help=f"Of adaptive: how the threshold follows verdicts: {', '.join(READINGS)}.")
]
Threshold = Annotated[float | None, typer.Option(help="Of token-confidence: hand over below it.")]
ProvisionalGrowth = Annotated[bool | None, typer.Option(help="Go on drafting while a pass runs.", show_default="on")]
Sharpening = Annotated[
    bool | None,
    typer.Option(help="Of best-first: learn how much surer the target is than the draft.", show_default="on"),
]
ReadLimit = Annotated[str | None, typer.Option(help="Hold the disk reads to a rate, such as 400MB/s.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML file of settings; options win over it.")]


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


def takes_job(command: Callable[..., None]) -> Callable[..., None]:
    """The command's first parameter, `job`, is made from the options that all such commands share."""
    shared = inspect.signature(job_from_options).parameters
    own = [p for p in inspect.signature(command).parameters.values() if p.name != "job"]

    @functools.wraps(command)
    def run(**options: Any) -> None:
        job = job_from_options(**{name: options.pop(name) for name in shared})
        command(job, **options)

    run.__signature__ = inspect.Signature([*own, *shared.values()])  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in (*own, *shared.values())}
    return run


def job_from_options(
    target: Target = DEMO,
    draft: Draft = "",
    memory: Memory = None,
    dtype: Dtype = None,
    max_nodes: MaxNodes = None,
    max_context: MaxContext = None,
    builder: Builder = None,
    fallback: Fallback = None,
    depth: Depth = None,
    widths: Widths = None,
    alpha: Alpha = None,
    alpha_update: AlphaUpdate = None,
    threshold: Threshold = None,
    provisional: ProvisionalGrowth = None,
    sharpen: Sharpening = None,
    read_limit: ReadLimit = None,
    config: ConfigFile = None,
) -> Prepared:
    """The checked job that options and the configuration file describe; options win."""
    options = {k: v for k, v in locals().items() if v is not None and k not in ("target", "draft", "config")}
    if "widths" in options:
        options["widths"] = parse_widths(options["widths"])
    settings = (read_config(config) if config else {}) | options
    if target != DEMO or "target" not in settings:
        settings["target"] = target
    if draft:
        settings["draft"] = draft
    return _prepared(spelled_out(EngineConfig(**settings), _demo_target))


def parse_widths(text: str) -> tuple[int, ...]:
    """ "1,1,3" -> (1, 1, 3); raises `ConfigError`."""
    try:
        return tuple(int(width) for width in text.split(","))
    except ValueError:
        raise ConfigError(f"widths: {text!r} must be whole numbers with commas between them, such as 1,1,3,1") from None


@app.command()
@reports_errors
@takes_job
def generate(
    job: Prepared,
    prompt: Annotated[str, typer.Argument(help="Text to continue, or `-` to read it from standard input.")] = "-",
    max_new_tokens: MaxNewTokens = 128,
    stop: Stop = None,
    chat: Chat = False,
    as_json: AsJson = False,
    trace: TraceFile = None,
) -> None:
    """Continue a text with a model bigger than the memory cap; the text streams as it is accepted."""
    check_writable(trace)
    text = sys.stdin.read() if prompt == "-" else prompt
    if chat:  # refused before anything starts, if at all
        job.chat_template()
    elif not text:
        job.opening()
    with StatusLine(screen) as line, Engine.start(job, say=line.say, count_caller=True) as engine:
        options = {"max_new_tokens": max_new_tokens, "stop": stop or (), "chat": chat, "trace": trace}
        result = _stream(engine, line, text, show=not as_json, **options)
    if as_json:
        print(json.dumps(_report(result, job)))


@app.command()
@reports_errors
@takes_job
def plan(job: Prepared, as_json: AsJson = False) -> None:
    """Show how the memory cap is split, what is pinned and what is streamed. Starts nothing."""
    if as_json:
        print(json.dumps(job.forecast()))
    else:
        Console().print(plan_table(job))


@app.command()
@reports_errors
def demo(
    size: Annotated[str, typer.Option(help="Bytes of the enlarged target.")] = "2.5GB",
    memory: Annotated[str, typer.Option(help="Cap on all memory used.")] = DEMO_MEMORY,
    max_new_tokens: MaxNewTokens = 96,
    plain_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate without speculation.")] = 6,
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = DEMO_PROMPT,
    as_json: AsJson = False,
    trace: TraceFile = None,
) -> None:
    """Run the bundled model, enlarged beyond the memory cap, with speculation and without, and compare."""
    check_writable(trace)
    path = _demo_target(parse_size(size, 1))
    job = _prepared(EngineConfig(target=str(path), draft=str(bundled_draft()), memory=memory))
    with StatusLine(screen) as line, Engine.start(job, say=line.say, count_caller=True) as engine:
        fast = _stream(engine, line, prompt, show=not as_json, max_new_tokens=max_new_tokens, trace=trace)
        line.say(f"the same without speculation, {plain_tokens} tokens")
        plain = engine.generate(prompt, max_new_tokens=plain_tokens, speculate=False)
    if as_json:
        print(json.dumps(_demo_report(fast, plain, job)))
    else:
        Console().print(demo_table(fast, plain, job))


@app.command()
@reports_errors
def doctor(
    path: Annotated[
        Path | None, typer.Option(help="A checkpoint, whose files are read, or a folder to test; default: the cache.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Measure less: seconds instead of a minute.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check this machine, and measure its disk and cores. Exit code 1: something stops llmcad from running."""
    from llmcad_actors.doctor import examine
    from llmcad_actors.doctor_views import tables

    with RichProgress(console=screen, transient=True) as bar:
        bars: dict[str, TaskID] = {}

        def say(what: str, share: float | None) -> None:  # without a share the bar only pulses
            for old in bars.keys() - {what}:
                bar.remove_task(bars.pop(old))
            if what not in bars:
                bars[what] = bar.add_task(what, total=None if share is None else 1.0)
            bar.update(bars[what], completed=share)

        report = examine(path, quick=quick, say=say)
    if as_json:
        print(json.dumps(report.as_dict()))
    else:
        for table in tables(report):
            Console().print(table)
    if not report.is_fit:
        raise typer.Exit(1)


@app.command("convert")
@reports_errors
def convert_model(
    source: Annotated[Path, typer.Argument(help="Model directory with pytorch_model.bin files.")],
    out: Annotated[Path, typer.Argument(help="Directory to make; run again to go on after an interruption.")],
    memory: Annotated[str, typer.Option(help="Cap on the memory used.")] = "2GB",
    dtype: Annotated[str, typer.Option(help="Store as: auto (as it is), float32, bfloat16, float16.")] = "auto",
) -> None:
    """Turn a pickled checkpoint (pytorch_model.bin) into safetensors, which llmcad can run. Runs no code of it."""
    from llmcad_actors.convert import convert  # here: it needs torch, and no other command does

    with RichProgress(console=screen, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task(f"converting {source.name}", total=None)
        made = convert(
            source,
            out,
            memory=memory,
            dtype=dtype,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    print(made)


@app.command("trace")
@reports_errors
def show_trace(
    file: Annotated[Path, typer.Argument(help="What `--trace` wrote.")],
    out: Annotated[Path | None, typer.Option(help="Write a timeline for Perfetto or chrome://tracing (JSON).")] = None,
    png: Annotated[Path | None, typer.Option(help="Draw the timeline (needs matplotlib).")] = None,
    tree: Annotated[int | None, typer.Option(help="Print the token tree of this pass; the first is 1.")] = None,
) -> None:
    """Look at a trace: a summary, or a timeline, a picture, the token tree of one pass."""
    trace = read_trace(file)
    if out is not None:
        write_chrome(trace, out)
    if png is not None:
        draw(trace, png)
    if tree is not None:
        Console().print(token_tree(trace, tree))
    if (out, png, tree) == (None, None, None):
        Console().print(summary_table(trace))


def _prepared(config: EngineConfig) -> Prepared:
    """`prepare`, with its notices on standard error."""
    job = prepare(config)
    for notice in job.notices:
        screen.print(f"llmcad: {notice}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    return job


def _demo_target(size_bytes: int = DEMO_BYTES) -> Path:
    with RichProgress(console=screen, transient=True) as bar:
        task = bar.add_task("enlarging the bundled target (once)", total=None)
        return demo_target(size_bytes, lambda done, total: bar.update(task, completed=done, total=total))


def _stream(engine: Engine, line: StatusLine, prompt: str, *, show: bool, **options: Any) -> Result:
    """Generate, writing accepted text to standard output as it comes."""
    line.follow(engine)
    pieces = []
    for piece in engine.stream(prompt, provisional=show, **options):
        pieces.append(piece)
        if show:
            line.guess(piece.text) if piece.provisional else line.write(piece.text)
    line.end()
    return engine.result(pieces)


def _report(result: Result, job: Prepared) -> dict[str, Any]:
    draft = str(job.draft.path) if job.draft else None
    return {**result.as_dict(), "target_path": str(job.target.path), "draft_path": draft}


def _demo_report(fast: Result, plain: Result, job: Prepared) -> dict[str, Any]:
    return {
        **_report(fast, job),
        "target_bytes": job.target.total_bytes,
        "seconds_per_token": fast.stats.seconds / fast.stats.new_tokens,
        "plain_seconds_per_token": plain.stats.seconds / plain.stats.new_tokens,
    }


def main() -> None:
    """Entry point."""
    command.main()


if __name__ == "__main__":
    main()
