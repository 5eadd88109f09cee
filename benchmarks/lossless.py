"""Is the output the target's own? Every prompt against transformers' `generate(do_sample=False)` on the same weights.

    python -m benchmarks.lossless [--target bundled] [--draft DIR|none] [--dtype float32] [--prompts 20] [--tokens 64]

The reference runs in this process and needs the whole model in memory. Prints one JSON line, with the texts that
differ. In float32 none may; in bfloat16 ties may fall either way, so for every text that differs there is how far apart
the two tokens are where it begins to: their logits by transformers in float32, in steps of bfloat16 at their size.
"""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.common import BUNDLED, emit, measurement, model_paths, read_prompts
from llmcad_actors.cli import reports_errors
from llmcad_actors.engine import Engine


def reference(path: Path, prompts: list[str], tokens: int, dtype: str) -> list[tuple[int, ...]]:
    """The new ids of plain greedy generation, by prompt."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
    found = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt).input_ids])
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens, pad_token_id=0
        )
        found.append(tuple(output[0, ids.shape[1] :].tolist()))
    return found


def tie(path: Path, prompt: str, ours: Sequence[int], theirs: Sequence[int]) -> dict[str, object]:
    """Where two continuations of `prompt` part, and the difference of the two tokens' logits there."""
    at = next(i for i, (a, b) in enumerate(itertools.zip_longest(ours, theirs)) if a != b)
    if at >= min(len(ours), len(theirs)):
        return {"prompt": prompt[-40:], "at": at, "gap_in_steps": None}  # one is shorter
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ids = [*AutoTokenizer.from_pretrained(path)(prompt).input_ids, *theirs[:at]]
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, -1]
    pair = logits[[ours[at], theirs[at]]]
    step = 2.0 ** (math.floor(math.log2(float(pair.abs().max()))) - 7)
    return {"prompt": prompt[-40:], "at": at, "gap_in_steps": round(float(pair[0] - pair[1]) / step, 2)}


@reports_errors
def main(
    target: Annotated[str, typer.Option(help="`bundled`, `demo`, or a model directory.")] = BUNDLED,
    draft: Annotated[str | None, typer.Option(help="Draft directory, or `none`; default: the bundled one.")] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    prompts: Annotated[int, typer.Option(help="How many prompts; the benchmark's come first, then their halves.")] = 20,
    text: Annotated[list[str] | None, typer.Option(help="Prompts to use instead.")] = None,
    tokens: Annotated[int, typer.Option(help="New tokens per prompt.")] = 64,
    memory: Annotated[str, typer.Option(help="Memory cap.")] = "2GB",
) -> None:
    """Print how many outputs differ."""
    path, draft_path = model_paths(target, None if draft == "none" else draft)
    whole = read_prompts(16)
    texts = text or list(itertools.islice([*whole, *(p[: len(p) // 2] for p in whole)], prompts))
    with Engine.launch(path, None if draft == "none" else draft_path, memory=memory, dtype=dtype) as engine:
        ours = [engine.generate(prompt, max_new_tokens=tokens).token_ids for prompt in texts]
    plain = reference(path, texts, tokens, dtype)
    different = [tie(path, prompt, a, b) for prompt, a, b in zip(texts, ours, plain, strict=True) if a != b]
    values = {"prompts": len(texts), "tokens": sum(map(len, ours)), "different": len(different), "which": different}
    config = {"target": target, "draft": draft or "default", "dtype": dtype, "memory": memory}
    emit(measurement("lossless", values, config=config, cache_state="irrelevant"))


if __name__ == "__main__":
    typer.run(main)
