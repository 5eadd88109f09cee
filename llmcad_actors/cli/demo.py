"""The demo's target on the command line: made once, with a word about what is written where; or only planned for."""

from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from llmcad_actors.cli.notices import tell
from llmcad_actors.core.sizes import format_size
from llmcad_actors.errors import StorageError
from llmcad_actors.tools.bundled import DEMO_BYTES, demo_folder, demo_target, is_demo_made, sketched_demo


def made_demo(size_bytes: int = DEMO_BYTES) -> Path:
    """The bundled target, enlarged to at least so many bytes. What takes room on the disk is said before."""
    folder = demo_folder(size_bytes)
    if not is_demo_made(size_bytes):
        tell([f"the demo's target is made once: {format_size(size_bytes)} in {folder} (`llmcad clean` removes it)"])
    screen = Console(stderr=True)
    with Progress(console=screen, redirect_stdout=False, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task("enlarging the bundled target (once)", total=None)
        try:
            return demo_target(size_bytes, lambda done, total: bar.update(task, completed=done, total=total))
        except StorageError as error:
            raise StorageError(f"{error} LLMCAD_CACHE names another one.") from None


def demo_to_run(stack: ExitStack) -> Path:
    return made_demo()


def demo_to_plan(stack: ExitStack) -> Path:
    """The demo's target, or, where it has not been made, what it would be, without its weights."""
    return stack.enter_context(sketched_demo())
