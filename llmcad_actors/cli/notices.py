"""Notices of the command line: a line each, on standard error."""

from collections.abc import Iterable

from rich.console import Console


def tell(lines: Iterable[str]) -> None:
    screen = Console(stderr=True)
    for line in lines:
        screen.print(f"llmcad: {line}", style="yellow", markup=False, highlight=False, soft_wrap=True)
