"""Standard output: text, objects and tables go through here, so that its end and its errors are met in one place."""

import io
import os
import sys
from contextlib import suppress

from rich.console import Console, RenderableType

from llmcad_actors.errors import StorageError

NOBODY_READS = 141  # what a shell reports of a program that SIGPIPE has ended


def write(text: str) -> None:
    """Write at once. Raises `SystemExit` once nobody reads any more; `StorageError` where it cannot be written."""
    if sys.stdout is None:
        raise StorageError("cannot write to standard output: it is closed")
    try:
        sys.stdout.write(_encodable(text))
        sys.stdout.flush()
    except BrokenPipeError:
        _discard_rest()
        raise SystemExit(NOBODY_READS) from None
    except OSError as error:
        _discard_rest()
        raise StorageError(f"cannot write to standard output: {error.strerror or error}") from None


def show(what: RenderableType) -> None:
    """Write a table or the like, as wide as the terminal; coloured on one."""
    drawn, own = io.StringIO(), Console()
    Console(file=drawn, force_terminal=own.is_terminal, width=own.width).print(what)
    write(drawn.getvalue())


def _encodable(text: str) -> str:
    """What standard output's encoding lacks becomes question marks."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


def _discard_rest() -> None:
    """What is still buffered goes nowhere: Python's last flush would complain of it."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
