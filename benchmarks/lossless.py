"""Is the output the target's own? Every prompt against transformers' `generate(do_sample=False)` on the same weights.

    python -m benchmarks.lossless [--target bundled] [--draft DIR|none] [--dtype float32] [--prompts 20] [--tokens 64]

The reference runs in this process and needs the whole model in memory. Prints one JSON line, with the texts that
differ; in bfloat16 exact ties may fall either way, in float32 nothing may differ.
"""

import itertools
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.common import BUNDLED, emit, measurement, model_paths, read_prompts
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
    different = [prompt[-40:] for prompt, a, b in zip(texts, ours, plain, strict=True) if a != b]
    values = {"prompts": len(texts), "tokens": sum(map(len, ours)), "different": len(different), "which": different}
    config = {"target": target, "draft": draft or "default", "dtype": dtype, "memory": memory}
    emit(measurement("lossless", values, config=config, cache_state="irrelevant"))


if __name__ == "__main__":
    typer.run(main)
