"""The `llmcad` command: parses, prints, nothing else."""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from llmcad_actors.bundled import resolve_models
from llmcad_actors.config import EngineConfig, read_config
from llmcad_actors.engine import Engine
from llmcad_actors.errors import ConfigError, LlmcadError
from llmcad_actors.planning import Prepared, prepare
from llmcad_actors.results import Piece, Result
from llmcad_actors.status import StatusLine

app = typer.Typer(
    name="llmcad",
    help="Run language models bigger than the memory you give them, with exactly the model's own output.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
err = Console(stderr=True)

Target = Annotated[str, typer.Option(help="Hugging Face directory of the model to run, or `demo`.")]
Draft = Annotated[
    str | None, typer.Option(help="Directory of a small model of the same tokenizer, or `none`: one token a pass.")
]
Memory = Annotated[str, typer.Option(help="Cap on all memory used: 1.5GB, 512MiB, or 75% of RAM.")]
MaxNew = Annotated[int, typer.Option("--max-new-tokens", "-n", help="Tokens to generate at most.")]
Stop = Annotated[list[str] | None, typer.Option(help="End the text before this string; may be repeated.")]
Dtype = Annotated[str, typer.Option(help="Compute in: auto (as stored), float32, bfloat16.")]
MaxNodes = Annotated[int, typer.Option(help="Tree nodes checked in one pass at most.")]
MaxContext = Annotated[int | None, typer.Option(help="Tokens of prompt and output to plan for.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on standard output.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML file of settings; options win over it.")]
...
