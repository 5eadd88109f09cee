"""What transformers makes of a prompt: the texts to compare with, kept from one run to the next."""

import hashlib
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.common import screen
from llmcad_actors.machine.cache import cache_folder

Ids = tuple[int, ...]


def prompt_ids(path: Path, texts: Sequence[str], *, chat: bool) -> list[Ids]:
    """As transformers tokenizes them; chat: inside the model's template."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    if not chat:
        return [tuple(tokenizer(text).input_ids) for text in texts]
    messages = [[{"role": "user", "content": text}] for text in texts]
    return [tuple(tokenizer.apply_chat_template(m, add_generation_prompt=True, return_dict=False)) for m in messages]


@cache
def plain_model(path: Path, dtype: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()


def reference(path: Path, prompts: Sequence[Ids], tokens: int, dtype: str) -> list[Ids]:
    """The new ids of transformers' plain greedy generation, by prompt.

    Kept in the cache folder, by everything that they depend on: the model's files, the prompt, the type, the version.
    """
    kept = [_kept(path, prompt, tokens, dtype) for prompt in prompts]
    missing = [i for i, file in enumerate(kept) if not file.exists()]
    for i in track(missing, "transformers", console=screen, disable=not missing):
        kept[i].parent.mkdir(parents=True, exist_ok=True)
        kept[i].write_text(json.dumps(_generated(path, prompts[i], tokens, dtype)))
    return [tuple(json.loads(file.read_text())) for file in kept]


def _generated(path: Path, prompt: Ids, tokens: int, dtype: str) -> list[int]:
    ids, model = torch.tensor([prompt]), plain_model(path, dtype)
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens, pad_token_id=0
    )
    found: list[int] = output[0, ids.shape[1] :].tolist()
    return found


def _kept(path: Path, prompt: Ids, tokens: int, dtype: str) -> Path:
    import transformers

    files = sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in path.iterdir() if f.is_file())
    versions = torch.__version__, transformers.__version__
    key = hashlib.sha256(repr((str(path), files, prompt, tokens, dtype, versions)).encode()).hexdigest()
    return cache_folder() / "references" / f"{key}.json"


def logits_behind(path: Path, ids: Sequence[int]) -> torch.Tensor:
    """transformers' float32 logits of the token after `ids`."""
    with torch.inference_mode():
        found: torch.Tensor = plain_model(path, "float32")(torch.tensor([list(ids)])).logits[0, -1]
    return found
