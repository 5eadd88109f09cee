"""What a benchmark runs: a target, a draft, and texts to go on from.

The bundled pair, the demo's target and directories continue stretches of Python source. The published model
(`real_model.py`) answers questions inside its chat template.
"""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.common import HERE, model_paths
from llmcad_actors.errors import ConfigError, StorageError

PROMPTS = HERE / "prompts_python.jsonl"
QUESTIONS = HERE / "questions.jsonl"
NO_DRAFT = "none"

Draft = Annotated[
    str | None,
    typer.Option(
        help="Directory, or `none`; default: the bundled one. With --real also 4bit (the default), 3bit, random."
    ),
]
Real = Annotated[bool, typer.Option("--real", help="The published model, in place of --target.")]
Large = Annotated[bool, typer.Option("--large", help="The published model, enlarged to 2.5 GB.")]
Questions = Annotated[
    Path | None,
    typer.Option(help="JSON lines with `turns`, asked inside the chat template; default with --real: questions.jsonl."),
]


@dataclass(frozen=True, slots=True)
class Workload:
    """Models and what they are given."""

    target: Path
    draft: Path | None
    texts: list[str]
    is_chat: bool  # the texts are a user's messages, and the model's chat template goes around them

    def config(self) -> dict[str, object]:
        """For a measurement: what was run, without the folders of this machine."""
        draft = self.draft.name if self.draft else None
        return {"target": self.target.name, "draft": draft, "prompts": len(self.texts), "chat": self.is_chat}


def chosen(
    target: str,
    draft: str | None,
    count: int,
    *,
    real: bool = False,
    large: bool = False,
    questions: Path | None = None,
) -> Workload:
    """What the options of these names ask for, and `count` texts at most. Raises `ConfigError` or `StorageError`."""
    if count < 1:
        raise ConfigError("--prompts must be 1 or more")
    if real or large:
        from benchmarks import real_model  # here: it needs torch, which would show in what benchmarks.memory measures

        path, draft_path = real_model.paths(draft, is_large=large)
        questions = questions or QUESTIONS
    else:
        path, bundled = model_paths(target, None if draft == NO_DRAFT else draft)
        draft_path = None if draft == NO_DRAFT else bundled
    texts = read_prompts(count) if questions is None else read_questions(questions, count)
    return Workload(path, draft_path, texts, questions is not None)


def read_prompts(count: int) -> list[str]:
    """`count` stretches of source: the benchmark's, then their first halves."""
    whole = [json.loads(line)["prompt"] for line in PROMPTS.read_text().splitlines()]
    return list(itertools.islice([*whole, *(text[: len(text) // 2] for text in whole)], count))


def read_questions(file: Path, count: int) -> list[str]:
    """The first turns of `count` questions, evenly spread over the file: question i * (all) // count for each i.

    A file whose categories follow each other, as Spec-Bench's do, is asked of each about in proportion.
    """
    try:
        found = [json.loads(line)["turns"][0] for line in file.read_text().splitlines()]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise StorageError(f"{file} cannot be read as JSON lines with `turns`: {error!r}") from None
    count = min(count, len(found))
    return [found[i * len(found) // count] for i in range(count)]
