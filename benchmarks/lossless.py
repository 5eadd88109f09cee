"""Is the output the target's own? Every text against transformers' `generate(do_sample=False)` on the same weights.

    python -m benchmarks.lossless [--target bundled] [--draft DIR|none] [--prompts 20] [--tokens 64]
    python -m benchmarks.lossless --real [--large] [--draft 4bit|3bit|random|none] [--questions FILE] [--runs 2]

The first form asks the bundled pair, or a model of yours. The second asks a published, instruct-tuned model
(`real_model.py`), small or enlarged, inside its chat template; FILE has lines with `turns`, as Spec-Bench's, and is
gone through evenly: 80 of 480 questions are every sixth. Every text is made with the draft, `--runs` times, since trees
depend on timing, and once plainly, and all are compared.

The reference computes in float32 whatever `--dtype` says, unless `--reference-dtype` names another type; it runs in
this process, needs the whole model in memory, and is kept for later runs. Prints one JSON line: how many texts are
equal, and for those that are not, where they part and how far apart the two tokens are there: their logits by
transformers in float32, in steps of the computing type at their size.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import track

from benchmarks import workload
from benchmarks.common import BUNDLED, emit, measurement, screen
from benchmarks.reference import Ids, logits_behind, prompt_ids, reference
from benchmarks.workload import Workload
from llmcad_actors.cli.commands import reports_errors
from llmcad_actors.config import Settings
from llmcad_actors.engine import Engine

MANTISSA = {"float32": 23, "bfloat16": 7}


@dataclass(frozen=True)
class Texts:
    """The new ids of every prompt, by way of making them."""

    trees: list[list[Ids]]  # one for each run
    plain: list[Ids]
    theirs: list[Ids]

    def counts(self) -> dict[str, int]:
        """How many texts are the same, by pair; of several runs, in all of them."""
        return {
            "tree_is_plain": _same(self.plain, *self.trees),
            "tree_is_tree_again": _same(*self.trees),
            "plain_is_transformers": _same(self.plain, self.theirs),
            "tree_is_transformers": _same(self.theirs, *self.trees),
        }


def _same(*ways: list[Ids]) -> int:
    return sum(len(set(texts)) == 1 for texts in zip(*ways, strict=True))


def parted(path: Path, prompt: Ids, ours: Ids, theirs: Ids, dtype: str) -> dict[str, object]:
    """Where two continuations of `prompt` part, and the difference of the two tokens' logits there."""
    at = next(i for i, (a, b) in enumerate(itertools.zip_longest(ours, theirs)) if a != b)
    if at >= min(len(ours), len(theirs)):
        return {"at": at, "gap_in_steps": None}  # one is shorter
    logits = logits_behind(path, [*prompt, *theirs[:at]])
    pair = logits[[ours[at], theirs[at]]]
    step = 2.0 ** (math.floor(math.log2(float(pair.abs().max()))) - MANTISSA[dtype])
    return {"at": at, "gap": float(pair[0] - pair[1]), "gap_in_steps": round(float(pair[0] - pair[1]) / step, 2)}


@reports_errors
def main(
    target: Annotated[str, typer.Option(help="`bundled`, `demo`, or a model directory.")] = BUNDLED,
    draft: workload.Draft = None,
    dtype: Annotated[str, typer.Option(help="What we compute in: auto (float32), float32 or bfloat16.")] = "auto",
    reference_dtype: Annotated[str, typer.Option(help="What transformers computes in.")] = "float32",
    prompts: Annotated[int, typer.Option(min=1, help="How many texts.")] = 20,
    tokens: Annotated[int, typer.Option(min=1, help="New tokens per text.")] = 64,
    memory: Annotated[str | None, typer.Option(help="Memory cap; default: 75 % of the machine.")] = None,
    real: workload.Real = False,
    large: workload.Large = False,
    questions: workload.Questions = None,
    runs: Annotated[int, typer.Option(min=1, help="Times that every text is made with the draft.")] = 1,
    plain: Annotated[bool, typer.Option(help="Make every text without the draft too.")] = True,
    fallback: Annotated[str, typer.Option(help="The policy; the default leaves out useless drafts.")] = "marginal",
) -> None:
    """Print how many texts are the same."""
    work = workload.chosen(target, draft, prompts, real=real, large=large, questions=questions)
    ids = prompt_ids(work.target, work.texts, chat=work.is_chat)
    longest = max(map(len, ids)) + tokens
    settings: Settings = {"dtype": dtype, "fallback": fallback, "max_context": longest}
    with Engine.launch(work.target, work.draft, memory=memory, **settings) as engine:
        trees = [generate(engine, work, tokens, f"with the draft, {run + 1} of {runs}") for run in range(runs)]
        alone = generate(engine, work, tokens, "plainly", speculate=False) if plain and work.draft else trees[0]
        cap_bytes = engine.stats.memory_cap_bytes
    found = Texts(trees, alone, reference(work.target, ids, tokens, reference_dtype))
    which = list(differences(work, ids, found, "bfloat16" if dtype == "bfloat16" else "float32"))
    counts = {"texts": len(ids), "tokens": sum(map(len, found.theirs))} | found.counts()
    config = work.config() | {
        "dtype": dtype,
        "reference_dtype": reference_dtype,
        "memory_cap_bytes": cap_bytes,
        "new_tokens": tokens,
        "runs": runs,
        "plain": plain or work.draft is None,
        "fallback": fallback,
    }
    emit(measurement("lossless", counts | {"which": which}, config=config, cache_state="irrelevant"))


def generate(engine: Engine, work: Workload, tokens: int, what: str, *, speculate: bool = True) -> list[Ids]:
    """The new tokens of every text."""
    return [
        engine.generate(text, max_new_tokens=tokens, chat=work.is_chat, speculate=speculate).token_ids
        for text in track(work.texts, what, console=screen)
    ]


def differences(work: Workload, ids: Sequence[Ids], found: Texts, dtype: str) -> Iterator[dict[str, object]]:
    """Every text that is not transformers'. What differs between two of our ways differs from it in one of them."""
    ways = {"plain": found.plain} | {f"tree {number}": tree for number, tree in enumerate(found.trees, 1)}
    for way, ours in ways.items():
        for i, theirs in enumerate(found.theirs):
            if ours[i] != theirs:
                where = parted(work.target, ids[i], ours[i], theirs, dtype)
                yield {"text": i, "ends": work.texts[i][-40:], "way": way} | where


if __name__ == "__main__":
    typer.run(main)
