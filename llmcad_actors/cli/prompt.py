"""The prompt on the command line: an argument, standard input, and texts that look like options."""

import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from typer.core import TyperCommand

from llmcad_actors.plan.prompt import read_standard_input

STANDARD_INPUT = "-"
HINT = "A text that begins with - goes behind --, as in: llmcad {command} -- '-1, -2, -3'"


def prompt_text(argument: str) -> str:
    """The argument, or what standard input holds. Raises `ConfigError` for input that is not text."""
    if argument != STANDARD_INPUT:
        return argument
    if sys.stdin is not None and sys.stdin.isatty():
        screen = Console(stderr=True)
        screen.print("llmcad: reading the prompt from standard input; end it with Ctrl-D", markup=False)
    return read_standard_input()


class PromptCommand(TyperCommand):
    """A command whose argument is a text: where one is taken for an option, the way out is named."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        hint = HINT.format(command=self.name)
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            if type(error).__name__ != "NoSuchOption" or not _may_be_a_text(error, given):
                raise
            raise ctx.fail(f"{error.format_message()}. {hint}") from None  # type: ignore[attr-defined]


def _may_be_a_text(error: Any, args: Sequence[str]) -> bool:
    """Unless it is one word that is nearly the name of an option."""
    words = [arg for arg in args if arg.startswith(error.option_name)]
    return not error.possibilities or any(" " in word.partition("=")[0] for word in words)
