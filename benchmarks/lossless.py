"""Is the output the target's own? Every text against transformers' `generate(do_sample=False)` on the same weights.

    python -m benchmarks.lossless [--target bundled] [--draft DIR|none] [--prompts 20] [--tokens 64]
    python -m benchmarks.lossless --real [--large] [--draft 4bit|3bit|random|none] --questions FILE [--runs 2]

The first form asks the bundled pair, or a model of yours. The second asks a published, instruct-tuned model
(`real_model.py`), small or enlarged, inside its chat template; FILE has lines with `turns`, as Spec-Bench's. Every text
is made with the draft, `--runs` times, since trees depend on timing, and once plainly, and all are compared.

The reference computes in float32 whatever `--dtype` says, unless `--reference-dtype` names another type; it runs in
this process, needs the whole model in memory, and is kept for later runs. Prints one JSON line: how many texts are
equal, and for those that are not, where they part and how far apart the two tokens are there: their logits by
transformers in float32, in steps of the computing type at their size.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import track

from benchmarks import real_model
from benchmarks.common import BUNDLED, emit, measurement, model_paths, read_prompts, screen
from benchmarks.questions import Ids, logits_behind, prompt_ids, read_questions, reference
from llmcad_actors.cli import reports_errors
from llmcad_actors.engine import Engine
from llmcad_actors.errors import ConfigError

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


def real_paths(draft: str | None, *, large: bool) -> tuple[Path, Path | None]:
    """The published model and a draft of it."""
    made = {"4bit": lambda: real_model.draft(4), "3bit": lambda: real_model.draft(3), "random": real_model.random_draft}
    target = real_model.large() if large else real_model.target()
    if draft == "none":
        return target, None
    return target, made[draft or "4bit"]() if draft in (None, *made) else Path(str(draft))


def generate(engine: Engine, texts: Sequence[str], tokens: int, *, chat: bool, speculate: bool, what: str) -> list[Ids]:
    return [
        engine.generate(text, max_new_tokens=tokens, chat=chat, speculate=speculate).token_ids
        for text in track(texts, what, console=screen)
    ]


@reports_errors
def main(
    target: Annotated[str, typer.Option(help="`bundled`, `demo`, or a model directory.")] = BUNDLED,
    draft: Annotated[str | None, typer.Option(help="Directory, `none`, or with --real 4bit, 3bit, random.")] = None,
    dtype: Annotated[str, typer.Option(help="What we compute in: auto (float32), float32 or bfloat16.")] = "auto",
    reference_dtype: Annotated[str, typer.Option(help="What transformers computes in.")] = "float32",
    prompts: Annotated[int, typer.Option(help="How many prompts; the benchmark's come first, then their halves.")] = 20,
    text: Annotated[list[str] | None, typer.Option(help="Prompts to use instead.")] = None,
    tokens: Annotated[int, typer.Option(help="New tokens per prompt.")] = 64,
    memory: Annotated[str | None, typer.Option(help="Memory cap; default: 75 % of the machine.")] = None,
    real: Annotated[bool, typer.Option(help="The published model.")] = False,
    large: Annotated[bool, typer.Option(help="The published model, enlarged to 2.5 GB.")] = False,
    questions: Annotated[Path | None, typer.Option(help="Ask these, inside the chat template.")] = None,
    runs: Annotated[int, typer.Option(help="Times that every text is made with the draft.")] = 1,
    plain: Annotated[bool, typer.Option(help="Make every text without the draft too.")] = True,
    fallback: Annotated[str, typer.Option(help="The policy; the default leaves out useless drafts.")] = "marginal",
) -> None:
    """Print how many texts are the same."""
    if real or large:
        path, draft_path = real_paths(draft, large=large)
    else:
        path, usual = model_paths(target, None if draft == "none" else draft)
        draft_path = None if draft == "none" else usual
    if runs < 1 or prompts < 1:
        raise ConfigError("--runs and --prompts are 1 or more")
    whole = read_prompts(16)
    texts = text or list(itertools.islice([*whole, *(p[: len(p) // 2] for p in whole)], prompts))
    texts = read_questions(questions, prompts) if questions else texts
    chat, ids = questions is not None, prompt_ids(path, texts, chat=questions is not None)
    with Engine.launch(
        path, draft_path, memory=memory, dtype=dtype, fallback=fallback, max_context=max(map(len, ids)) + tokens
    ) as engine:
        trees = [
            generate(engine, texts, tokens, chat=chat, speculate=True, what=f"with the draft, {run + 1} of {runs}")
            for run in range(runs if draft_path else 1)
        ]
        alone = trees[0]
        if draft_path and plain:
            alone = generate(engine, texts, tokens, chat=chat, speculate=False, what="plainly")
        stats = engine.stats
    found = Texts(trees, alone, reference(path, ids, tokens, reference_dtype))
    step = "bfloat16" if dtype == "bfloat16" else "float32"
    which = [
        {"prompt": i, "text": texts[i][-40:], "way": way} | parted(path, ids[i], ours[i], found.theirs[i], step)
        for way, ours in (("plain", alone), *((f"tree {n + 1}", tree) for n, tree in enumerate(trees)))
        for i in range(len(texts))
        if ours[i] != found.theirs[i]
    ]
    counts = {"prompts": len(texts), "tokens": sum(map(len, found.theirs))} | found.counts()
    values = counts | {"different": len(texts) - counts["tree_is_transformers"], "which": which}
    config = {
        "target": path.name,
        "draft": draft_path.name if draft_path else None,
        "dtype": dtype,
        "reference_dtype": reference_dtype,
        "memory_cap_bytes": stats.memory_cap_bytes,
        "chat": chat,
        "plain": plain or draft_path is None,
        "fallback": fallback,
        "runs": runs,
    }
    emit(measurement("lossless", values, config=config, cache_state="irrelevant"))


if __name__ == "__main__":
    typer.run(main)
