"""The plain model, as transformers runs it: what every output is compared with."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmcad_actors.core.acceptance import Accepted, walk
from llmcad_actors.core.tree import TokenTree

torch.set_num_threads(1)  # tiny models: threads would only wait for each other


class Plain:
    """A checkpoint in float32."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.logprobs = cache(self._logprobs)

    @classmethod
    def of(cls, path: Path) -> "Plain":
        """`Plain(path)`, loaded once."""
        return _loaded(path)

    @torch.inference_mode()
    def greedy(self, prompt: Sequence[int], count: int) -> tuple[int, ...]:
        """`generate(do_sample=False)`: the new tokens, the end-of-text token included."""
        ids = torch.tensor([list(prompt)])
        out = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, pad_token_id=0
        )
        return tuple(out[0, len(prompt) :].tolist())

    def next(self, tokens: Sequence[int]) -> int:
        """The token after `tokens`."""
        return int(self.logprobs(tuple(tokens)).argmax())

    def continuation(self, tokens: Sequence[int], count: int) -> tuple[int, ...]:
        """`count` tokens after `tokens`; no token ends the text."""
        found: list[int] = []
        for _ in range(count):
            found.append(self.next((*tokens, *found)))
        return tuple(found)

    def judge(self, tree: TokenTree, committed: Sequence[int], stop: frozenset[int] = frozenset()) -> Accepted:
        """The verdict on a tree whose root is the last of `committed`, found path by path."""
        paths = [tree.tokens[list(tree.path(node))].tolist() for node in range(-1, len(tree))]
        return walk(tree, [self.next((*committed, *path)) for path in paths], stop)

    @torch.inference_mode()
    def _logprobs(self, tokens: tuple[int, ...]) -> np.ndarray:
        logits = self.model(torch.tensor([tokens])).logits[0, -1]
        return np.asarray(logits.log_softmax(-1).numpy())


@cache
def _loaded(path: Path) -> Plain:
    return Plain(path)


@cache
def encode(path: Path, text: str) -> tuple[int, ...]:
    """The ids that `AutoTokenizer` gives."""
    return tuple(AutoTokenizer.from_pretrained(path)(text)["input_ids"])
