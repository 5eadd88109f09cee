"""A row's logits have the same bits in a token tree, in a chunk of a prompt, and in a pass of its own.

In float32, around weights as they are stored. So what a tree says never depends on the tree.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmcad_actors.core.request import Request
from llmcad_actors.core.tree import TokenTree
from llmcad_actors.kernels import attention, products
from llmcad_actors.models.target import Part
from tests import encoder_decoder_cases, family_cases
from tests.fakes import OneText, random_trees, tokens_to
from tests.kernels.test_products import every_set, needs_kernels, torch_threads, using
from tests.models.checkpoints import target_of
from tests.tiny import BYTE_VOCAB

ALL: dict[str, family_cases.Case | encoder_decoder_cases.Case] = {**family_cases.CASES, **encoder_decoder_cases.CASES}
PROMPT = tuple(np.random.default_rng(1).integers(2, BYTE_VOCAB, 37).tolist())
NODES = 24


class Listened:
    """A target, and the logits of its passes' root and nodes, [nodes + 1, vocab]."""

    def __init__(self, path: Path, prefill_chunk: int = 256) -> None:
        self.one, _ = target_of(path, prefill_chunk=prefill_chunk)
        self.logits = torch.empty(0)
        self._judge = self.one.target._judge
        self.one.target._judge = self._listen  # type: ignore[method-assign]

    def _listen(self, hidden: torch.Tensor, parts: Sequence[Part]) -> Any:
        (part,) = parts
        self.logits = self.one.target._logits(hidden[list(part.chooses)])
        return self._judge(hidden, parts)

    def after(self, prompt: Sequence[int], tokens: Sequence[int], tree: TokenTree) -> torch.Tensor:
        """Of a pass over `tree`, after a prompt and output `tokens`; what the cache holds of them stays there."""
        begin(self.one, prompt, tokens)
        self.one.verify(tree)
        return self.logits


def begin(one: OneText, prompt: Sequence[int], tokens: Sequence[int]) -> None:
    """As if the target had said `tokens`."""
    if one.target.layout.family.encoder is None:
        one.begin((*prompt, *tokens))
        return
    number, request = 1, Request(tuple(prompt), 40, ())
    one.target.end(number)
    one._number = number
    one.target._begin(number, request, one.target._stack.begin(prompt), tokens)


def plain(path: Path, tokens: Sequence[int], prefill_chunk: int = 256) -> list[torch.Tensor]:
    """Logits after the prompt and each of `tokens`, one row a pass."""
    listened = Listened(path, prefill_chunk)
    return [listened.after(PROMPT, tokens[:count], TokenTree.empty())[0] for count in range(len(tokens) + 1)]


def deepest(tree: TokenTree) -> list[int]:
    return list(tree.path(int(np.argmax(tree.depths))))


@needs_kernels
@pytest.mark.parametrize("name", ALL)
def test_in_every_family(name: str, tmp_path: Path) -> None:
    path = ALL[name].save(tmp_path, dtype=torch.bfloat16)
    tree = random_trees(3, BYTE_VOCAB, max_nodes=NODES)(PROMPT)
    nodes = deepest(tree)
    assert len(tree) > 10 and len(nodes) > 3 and nodes != list(range(len(nodes)))
    found = Listened(path).after(PROMPT, (), tree)
    expected = plain(path, tokens_to(tree, nodes[-1]), prefill_chunk=7)
    for row, logits in zip([0, *[1 + node for node in nodes]], expected, strict=True):
        assert torch.equal(found[row], logits)


@needs_kernels
@every_set
@pytest.mark.parametrize("stored", list(products.KINDS), ids=str)
def test_with_all_instructions_and_stored_types(instructions: str, stored: torch.dtype, tmp_path: Path) -> None:
    path = ALL["gemma2"].save(tmp_path, dtype=stored)
    tree = random_trees(4, BYTE_VOCAB, max_nodes=NODES)(PROMPT)
    with using(instructions):
        found = Listened(path).after(PROMPT, (), tree)
        last = deepest(tree)[-1]
        assert torch.equal(found[1 + last], plain(path, tokens_to(tree, last))[-1])


@needs_kernels
@pytest.mark.parametrize("name", ["llama", "qwen2_moe, windows", "gpt2", "gpt_neox", "t5"])
def test_with_any_number_of_threads(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "SMALL", 0)
    monkeypatch.setattr(attention, "SMALL", 0)
    path = ALL[name].save(tmp_path, dtype=torch.bfloat16)
    tree = random_trees(5, BYTE_VOCAB, max_nodes=100)(PROMPT)
    with torch_threads(1):
        expected = Listened(path).after(PROMPT, (), tree)
    with torch_threads(2):
        assert torch.equal(Listened(path, prefill_chunk=16).after(PROMPT, (), tree), expected)


@needs_kernels
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_row_that_was_accepted_is_the_row_that_would_have_been_computed(name: str, tmp_path: Path) -> None:
    """Keys and values that a tree's pass left in the cache, too."""
    path, said = ALL[name].save(tmp_path, dtype=torch.bfloat16), list[int]()
    one_by_one, listened = Listened(path), Listened(path)
    for _ in range(5):
        expected = one_by_one.after(PROMPT, said, TokenTree.empty())[0]
        said.append(int(expected.argmax()))
    right = said[:3]
    tree = TokenTree.build([right[0] ^ 1, right[0], right[1], right[1] ^ 1, right[2]], [-1, -1, 1, 1, 2], [-1.0] * 5)
    begin(listened.one, PROMPT, ())
    assert listened.one.verify(tree).path == (1, 2, 4)
    listened.one.verify(TokenTree.empty())
    assert torch.equal(listened.logits[0], expected)
