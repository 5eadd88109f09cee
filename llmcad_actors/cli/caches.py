"""`llmcad models` and `llmcad clean`: what the caches hold, and making room."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from llmcad_actors.cli import output
from llmcad_actors.cli.examples import epilog
from llmcad_actors.cli.options import AsJson
from llmcad_actors.core.sizes import format_size
from llmcad_actors.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from llmcad_actors.tools.caches import HeldModel, Leftover

Yes = Annotated[bool, typer.Option("--yes", "-y", help="Remove without asking.")]


def add_cache_commands(app: typer.Typer, panel: str, reports_errors: Callable[..., Any]) -> None:
    for name, command in (("models", models), ("clean", clean)):
        app.command(name, epilog=epilog(name), rich_help_panel=panel)(reports_errors(command))


def models(as_json: AsJson = False) -> None:
    """Show which models are in the caches, how large they are, and whether llmcad can run them."""
    from llmcad_actors.machine.cache import cache_folder
    from llmcad_actors.storage.model_names import hub_cache
    from llmcad_actors.tools.caches import held_models

    found, places = held_models(), {"llmcad": str(cache_folder()), "Hugging Face": str(hub_cache())}
    if as_json:
        rows = [{**asdict(model), "path": str(model.path), "can_run": not model.problem} for model in found]
        output.write(json.dumps({"models": rows, "caches": places}) + "\n")
        return
    output.show(models_table(found))
    for name, folder in places.items():
        held = format_size(sum(model.nbytes for model in found if model.place == name))
        output.write(f"{name} cache: {folder} ({held} of models)\n")


def clean(yes: Yes = False) -> None:
    """Remove what llmcad made and can make again: enlarged models, logs, what ended sessions left. Asks first.

    Never touches the Hugging Face cache, nor a running session.
    """
    from llmcad_actors.tools.caches import leftovers, remove

    found, is_running = leftovers()
    screen = Console(stderr=True)
    if is_running:
        screen.print("llmcad: a session is running: enlarged models and logs stay", markup=False)
    if not found:
        screen.print("llmcad: there is nothing to remove", markup=False)
        return
    screen.print(leftovers_table(found))
    total = format_size(sum(each.nbytes for each in found))
    if not (yes or (sys.stdin is not None and sys.stdin.isatty())):
        raise ConfigError(f"nothing was removed: nobody can be asked here; llmcad clean --yes removes these {total}")
    if not (yes or typer.confirm(f"Remove these {total}?", err=True)):
        screen.print("llmcad: nothing was removed", markup=False)
        return
    for each in found:
        remove(each)
    screen.print(f"llmcad: {total} removed", markup=False, highlight=False)


def models_table(found: Sequence["HeldModel"]) -> "Table":
    table = _table("models", "name", "where", "size", "architecture", "can run")
    for each in found:
        verdict = f"no: {each.problem}" if each.problem else "yes"
        table.add_row(*map(_plain, (each.name, each.place, format_size(each.nbytes), each.architecture, verdict)))
    return table


def leftovers_table(found: Sequence["Leftover"]) -> "Table":
    table = _table("can be removed", "what", "where", "size")
    for each in found:
        table.add_row(*map(_plain, (each.what, str(each.path), format_size(each.nbytes))))
    return table


def _table(title: str, *columns: str) -> "Table":
    from rich.table import Table

    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="right" if column == "size" else "left", overflow="fold")
    return table


def _plain(text: str) -> str:
    return text.replace("[", r"\[")
