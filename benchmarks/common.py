"""What all benchmarks share: a measurement is one JSON line that says where it comes from."""

import json
import os
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from llmcad_actors.machine.figures import cpu_model
from llmcad_actors.tools.bundled import DEMO, bundled_draft, bundled_target, demo_target

HERE = Path(__file__).parent

screen = Console(stderr=True)
"""Progress and tables: standard output carries the measurements."""

BUNDLED = "bundled"


@dataclass(frozen=True, slots=True)
class Spread:
    """Several runs of one thing."""

    median: float
    min: float
    max: float
    runs: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values), len(values))

    def as_dict(self) -> dict[str, float]:
        return {"median": self.median, "min": self.min, "max": self.max, "runs": self.runs}


def measurement(
    name: str,
    values: Mapping[str, Any],
    *,
    config: Mapping[str, Any],
    cache_state: str,
    seed: int | None = None,
) -> dict[str, Any]:
    """One line. `cache_state`: what of the files was in memory before; `seed`: None where nothing is random."""
    plain = {key: value.as_dict() if isinstance(value, Spread) else value for key, value in values.items()}
    return {
        "name": name,
        **plain,
        "config": dict(config),
        "seed": seed,
        "cache_state": cache_state,
        "machine": machine(),
        "commit": commit(),
    }


def emit(line: Mapping[str, Any], out: Path | None = None) -> None:
    """Print the line, or append it to a file."""
    text = json.dumps(line)
    if out is None:
        print(text, flush=True)
    else:
        with out.open("a") as file:
            file.write(text + "\n")


def machine() -> dict[str, Any]:
    return {"cpu": cpu_model(), "cores": os.cpu_count(), "ram_bytes": psutil.virtual_memory().total}


def commit() -> str:
    """The commit that runs; "+" after it when files differ from it, "unknown" outside a repository."""
    try:
        found = _git("rev-parse", "--short=12", "HEAD")
        return found + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def model_paths(target: str, draft: str | None = None) -> tuple[Path, Path]:
    """Target and draft that options name: "demo" and "bundled" bring their draft with them."""
    paths = {DEMO: demo_target, BUNDLED: bundled_target}
    path = paths[target]() if target in paths else Path(target)
    return path, Path(draft) if draft else bundled_draft()


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()
