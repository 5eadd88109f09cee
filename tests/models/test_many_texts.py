"""Texts that share passes: each is what it would be alone, bit for bit, and its rows come back."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcad_actors.core.request import Request
from llmcad_actors.core.round import Check
from llmcad_actors.core.tree import TokenTree
from llmcad_actors.models.target import Target
from tests.fakes import random_trees
from tests.models.checkpoints import target_of
from tests.plain import Plain
from tests.tiny import BYTE_VOCAB, tiny_llama

CAPACITY, NODES = 160, 48
PROMPT = tuple(np.random.default_rng(3).integers(2, BYTE_VOCAB, 60).tolist())


@dataclass
class Asked:
    """A request, and what has come of it."""

    prompt: tuple[int, ...]
    count: int
    seed: int
    said: list[int] = field(default_factory=list)

    def tree(self, plain: Plain) -> TokenTree:
        """A random one, and in every other pass a branch that is right."""
        tokens = (*self.prompt, *self.said)
        tree = random_trees(self.seed, BYTE_VOCAB)(tokens)
        if len(tokens) % 2:
            return tree
        right = plain.continuation(tokens, 3)
        first = tree.child(-1, right[0])
        if first is not None:
            return tree
        start = len(tree)
        return tree.extended([-1, start, start + 1], right, [-0.1] * 3)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Plain:
    return Plain(tiny_llama(tmp_path_factory.mktemp("many"), seed=11, layers=2, spread=0.5))


def targets(plain: Plain) -> Target:
    target, _ = target_of(plain.path, capacity=CAPACITY, max_nodes=NODES, prefill_chunk=16)
    return target.target


@settings(max_examples=25)
@given(data=st.data())
def test_every_text_is_its_own_whoever_comes_and_goes(plain: Plain, data: st.DataObject) -> None:
    target, running, number = targets(plain), dict[int, Asked](), 0
    for _ in range(data.draw(st.integers(4, 14))):
        if data.draw(st.booleans()):
            number += 1
            length = data.draw(st.integers(1, len(PROMPT)))
            start = data.draw(st.sampled_from([0, 0, 7]))
            asked = Asked(PROMPT[start : start + length], data.draw(st.integers(1, 12)), number)
            size = len(asked.prompt) + asked.count
            if sum(len(each.prompt) + each.count for each in running.values()) + size <= CAPACITY:
                held = target.begin(number, Request(asked.prompt, asked.count, ()))
                assert 0 <= held < len(asked.prompt)
                running[number] = asked
        if running and data.draw(st.integers(0, 4)) == 0:
            gone = data.draw(st.sampled_from(sorted(running)))
            target.end(gone)
            del running[gone]
        if not running:
            continue
        trees = {n: each.tree(plain).top(NODES // len(running))[0] for n, each in running.items()}
        most = {n: data.draw(st.sampled_from([None, None, 9])) for n in running}
        report = target.verify([Check(n, trees[n], most[n]) for n in running])
        assert report.verdicts.keys() | {n for n in running if most[n]} == running.keys()
        for n, verdict in report.verdicts.items():
            tree, asked = trees[n], running[n]
            expected = plain.judge(tree, (*asked.prompt, *asked.said))
            assert (verdict.path, verdict.bonus) == (expected.path, expected.bonus)
            asked.said += expected.emitted(tree)
            if len(asked.said) >= asked.count:
                target.end(n)
                del running[n]
        assert target.num_rows == sum(len(each.prompt) + each.count for each in running.values())
    for n in running:
        target.end(n)
    assert target.num_rows == 0
