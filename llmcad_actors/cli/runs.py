"""What `llmcad generate` and `llmcad demo` do once their options are understood: run, and tell.

Standard output gets the text and nothing else, or with `--json` the object. All that is about the run goes to standard
error: the status line, the summary, the demo's prompt and table.
"""

from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from llmcad_actors.cli.comparison import Comparison
from llmcad_actors.cli.notices import tell
from llmcad_actors.cli.report import Account
from llmcad_actors.cli.status import StatusLine, summary
from llmcad_actors.cli.views import demo_table
from llmcad_actors.core.budget import format_size
from llmcad_actors.core.lossless import LosslessCheck
from llmcad_actors.core.stats import Stats
from llmcad_actors.engine import Engine
from llmcad_actors.errors import LlmcadError
from llmcad_actors.plan.disk_settings import unmeasured
from llmcad_actors.plan.job import Prepared
from llmcad_actors.results import Result


def run_generate(job: Prepared, prompt: str, *, as_json: bool, quiet: bool, checks: bool, **options: Any) -> bool:
    """Start an engine and continue `prompt`; options as for `Engine.stream`.

    checks: decode again without the draft. Returns False where the text turns out not to be the target's own.
    """
    with running(job, as_json=as_json, quiet=quiet) as (engine, line, account):
        return generate(engine, line, account, prompt, as_json=as_json, quiet=quiet, checks=checks, **options)


def generate(
    engine: Engine,
    line: StatusLine,
    account: Account,
    prompt: str,
    *,
    as_json: bool,
    quiet: bool,
    checks: bool = False,
    **options: Any,
) -> bool:
    """One request, from its first piece to what is said at its end; as `run_generate`."""
    result = stream(engine, line, account, prompt, show=not as_json, **options)
    found = check(engine, line, result, prompt, **options) if checks else None
    account.give(result, **({} if found is None else {"lossless": found.as_dict()}))
    if is_told := not (as_json or quiet):
        tell(idle_draft(account.job, result.stats))
        say(summary(result.stats), style="dim")
    if found is None:
        return True
    if is_told or not found.is_same:
        say(str(found), style="bold" if found.holds else "bold red")
    return found.holds


def check(
    engine: Engine, line: StatusLine, result: Result, prompt: str, *, stop: Any, trace: Any, **options: Any
) -> LosslessCheck:
    """`Engine.check_lossless`, with the status line; `stop` and `trace` are of the first decoding alone."""
    try:
        with line.following(engine, "now plainly, to compare"):
            return engine.check_lossless(result, prompt, **options)
    finally:
        line.end()


def run_demo(
    job: Prepared, prompt: str, *, max_new_tokens: int, plain_tokens: int, as_json: bool, trace: Path | None
) -> bool:
    """Continue `prompt` with speculation, then its beginning without; whether both texts are the same."""
    with running(job, as_json=as_json, quiet=False) as (engine, line, account):
        if not as_json:
            line.lead(prompt)
        fast = stream(engine, line, account, prompt, show=not as_json, max_new_tokens=max_new_tokens, trace=trace)
        with line.following(engine, f"now {plain_tokens} tokens without speculation"):
            plain = engine.generate(prompt, max_new_tokens=plain_tokens, speculate=False)
        compared = Comparison(fast, plain)
        account.give(fast, prompt=prompt, target_bytes=job.target.total_bytes, **compared.as_dict())
        if not as_json:
            line.end()
            tell_comparison(compared, job)
    return compared.is_same


@contextmanager
def running(job: Prepared, *, as_json: bool, quiet: bool) -> Iterator[tuple[Engine, StatusLine, Account]]:
    """An engine, its status line, and the account of what it gives, which with `--json` is written in any case."""
    account = Account(job, as_json=as_json)
    tell(unmeasured(job.config, job.target))
    with (
        account.guarded(),  # its start
        StatusLine(draws=not quiet) as line,
        Engine.start(job, say=line.say, warn=line.warn, count_caller=True) as engine,
        account.guarded(),  # the request: written before the engine is closed, which may take a while or break too
    ):
        yield engine, line, account


def stream(engine: Engine, line: StatusLine, account: Account, prompt: str, *, show: bool, **options: Any) -> Result:
    """Generate, writing accepted text to standard output as it comes. However this ends, the request has ended."""
    pieces = []
    coming = engine.stream(prompt, provisional=show and line.shows_guesses, **options)
    try:
        with line.following(engine), closing(coming):
            for piece in coming:
                if piece.provisional:
                    line.guess(piece.text)
                    continue
                pieces.append(piece)
                account.add(piece, engine.stats)
                if show:
                    line.write(piece.text)
    finally:
        line.end()
        with suppress(LlmcadError):
            account.know(engine.stats)
    return engine.result(pieces)


def idle_draft(job: Prepared, stats: Stats) -> list[str]:
    """A notice of a draft that was ended, or left out of most passes."""
    if stats.draft_ended:
        held = format_size(job.draft_bytes)
        return [f"the draft was ended: hardly a guess of it was right; its {held} hold layers of the target instead"]
    if job.draft is None or 2 * stats.undrafted_passes <= stats.target_passes:
        return []
    passes = f"{stats.undrafted_passes} of {stats.target_passes} passes"
    freed = f"--draft none would free {format_size(job.draft_bytes)} for the target"
    return [f"the draft did not pay: {passes} ran without it; {freed}"]


def tell_comparison(compared: Comparison, job: Prepared) -> None:
    """The demo's figures, and in words what they show."""
    Console(stderr=True).print(demo_table(compared, job))
    say(compared.verdict, style="bold" if compared.is_same else "bold red")


def say(text: str, *, style: str) -> None:
    """On standard error, as one line however long."""
    Console(stderr=True).print(text, style=style, markup=False, highlight=False, soft_wrap=True)
