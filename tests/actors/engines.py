"""Jobs for engines on a real local Ray, and what of them can be seen from outside."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil

from llmcad_actors.config import EngineConfig
from llmcad_actors.core.budget import smallest_cap
from llmcad_actors.plan.footprint import budget_inputs
from llmcad_actors.plan.job import Prepared
from llmcad_actors.plan.prepare import prepare
from llmcad_actors.tools.bundled import bundled_draft, bundled_target
from tests.tiny import tiny_llama, with_template

MB = 1_000_000
TEMPLATE = "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ messages[0].content }}"
Job = Callable[[Path], Prepared]
"""A prepared job; makes its models in the folder it is given."""


def job(
    target: Path, draft: Path | None, *, extra_bytes: int = 0, overlaps: bool = True, **settings: object
) -> Prepared:
    """A job under the smallest cap that works, or overlaps, and `extra_bytes`, which pin layers."""
    config = EngineConfig(
        target=str(target),
        draft=None if draft is None else str(draft),
        memory="64GB",
        **settings,  # type: ignore[arg-type]
    )
    roomy = prepare(config)
    inputs = budget_inputs(config, roomy.target, roomy.layout, roomy.draft, roomy.context)
    return prepare(replace(config, memory=str(smallest_cap(inputs, overlaps=overlaps) + extra_bytes)))


def good_draft(folder: Path) -> Prepared:
    """The bundled pair, all of it pinned."""
    return job(bundled_target(), bundled_draft(), extra_bytes=60 * MB, dtype="float32", fallback="adaptive")


def random_target(folder: Path) -> Prepared:
    """Random models, all of the target streamed from several files, in many extents. The draft is hardly ever right."""
    target = with_template(tiny_llama(folder / "target", seed=1, max_file="100KB"), TEMPLATE)
    draft = tiny_llama(folder / "draft", seed=2, vocab=300, layers=1)
    return job(target, draft, max_nodes=6, extent_bytes=60_000, overlaps=False, fallback="adaptive")


def no_draft(folder: Path) -> Prepared:
    """A random target by itself, some of it pinned. Its tokenizer is what a class makes of it."""
    target = with_template(tiny_llama(folder / "target", seed=3, tied=True), TEMPLATE, tokenizer_class="GPT2Tokenizer")
    return job(target, None, extra_bytes=200_000)


def slow(folder: Path) -> Prepared:
    """A random target that takes seconds a pass."""
    target = tiny_llama(folder / "target", seed=4)
    draft = tiny_llama(folder / "draft", seed=5, layers=1)
    return job(target, draft, max_nodes=8, chunk_bytes=4096, extent_bytes=20_000, read_limit="500KB/s")


def processes_of(name: str) -> list[psutil.Process]:
    """Living actor processes below this one, by class."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        if words and words[0].startswith(f"ray::{name}"):
            found.append(process)
    return found
