"""Sampling draws from the target's distribution, and a text depends on its seed alone. tests/sampling.py draws more."""

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from llmcad_actors.core.choosing import Choosing, Noise, perturbed
from llmcad_actors.core.tree import TokenTree
from llmcad_actors.models.processors import make_processors
from tests.fakes import OneText, random_trees
from tests.models.checkpoints import target_of
from tests.plain import Plain
from tests.sampling import (
    CASES,
    NODES,
    TOGETHER,
    DraftTrees,
    Trees,
    exact,
    models,
    no_trees,
    p_values,
    texts,
    trees_by_chance,
)
from tests.tiny import BYTE_VOCAB, tiny_llama

DRAWS, FEW_DRAWS = 1500, 200
PROMPT = (5, 70, 12, 200, 33, 33, 9)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return models(tmp_path_factory.mktemp("pair"))


KINDS: dict[str, Callable[[tuple[Path, Path]], Trees]] = {
    "no trees": lambda pair: no_trees,
    "by chance": lambda pair: trees_by_chance,
    "a draft's": lambda pair: DraftTrees(pair[1]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_draws_follow_the_targets_distribution(pair: tuple[Path, Path], case: str, kind: str) -> None:
    """Seeds are fixed, so this passes or fails for ever."""
    target = target_of(pair[0], capacity=TOGETHER * 16, max_nodes=TOGETHER * NODES * 2)[0].target
    found = texts(target, KINDS[kind](pair), CASES[case], itertools.count(1), FEW_DRAWS if "draft" in kind else DRAWS)
    assert min(p_values(found, exact(Plain.of(pair[0]), CASES[case]))) > 0.001
    assert target.num_rows == 0


def test_another_distribution_is_told_apart(pair: tuple[Path, Path]) -> None:
    target = target_of(pair[0], capacity=TOGETHER * 16, max_nodes=TOGETHER * NODES * 2)[0].target
    found = texts(target, no_trees, CASES["temperature 0.7"], itertools.count(1), DRAWS)
    assert max(p_values(found, exact(Plain.of(pair[0]), Choosing(temperature=0.9)))) < 0.001


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Plain:
    return Plain(tiny_llama(tmp_path_factory.mktemp("bytes"), seed=7, layers=2, spread=0.5))


def said(one: OneText, choosing: Choosing, count: int, seed: int | None) -> list[int]:
    """A text, with trees of another draft for each `seed`; None: no trees."""
    one.begin(PROMPT, (), count, choosing)
    found: list[int] = []
    while len(found) < count:
        tree = TokenTree.empty() if seed is None else random_trees(seed, BYTE_VOCAB)(tuple(found))
        verdict = one.verify(tree)
        found += [*tree.tokens[list(verdict.path)].tolist(), verdict.bonus]
    return found[:count]


@pytest.mark.parametrize(
    "choosing",
    [
        Choosing(temperature=1.0, seed=3),
        Choosing(temperature=0.7, top_p=0.9, seed=2**64 - 1),
        Choosing(temperature=1.2, top_k=20, min_p=0.01, repetition_penalty=1.2, presence_penalty=0.5, seed=0),
        Choosing(frequency_penalty=1.0, logit_bias=((9, 4.0),)),
    ],
    ids=["temperature", "top-p", "all", "greedy with penalties"],
)
def test_a_text_is_what_transformers_processors_and_the_noise_make_of_the_plain_logits(
    plain: Plain, choosing: Choosing
) -> None:
    noise = Noise(choosing.seed, BYTE_VOCAB)
    rules = make_processors({}, choosing, prompt_length=len(PROMPT), max_length=99, stop_tokens=())
    expected = list[int]()
    for _ in range(24):
        tokens = (*PROMPT, *expected)
        with torch.inference_mode():
            scores = rules(torch.tensor([tokens]), plain.model(torch.tensor([tokens])).logits[:, -1].clone())
        row = scores[0].double().numpy()
        expected.append(int((row + noise.row(len(tokens)) if choosing.is_sampled else row).argmax()))
    one, _ = target_of(plain.path)
    assert all(said(one, choosing, 24, seed) == expected for seed in (None, 1, 2))


def test_another_seed_is_another_text(plain: Plain) -> None:
    one, _ = target_of(plain.path)
    texts_of_seeds = {tuple(said(one, Choosing(temperature=1.0, seed=seed), 12, None)) for seed in range(20)}
    assert len(texts_of_seeds) == 20


def test_logprobs_are_the_plain_models_whatever_is_done_to_the_choice(plain: Plain) -> None:
    one, _ = target_of(plain.path)
    choosing = Choosing(temperature=1.5, top_k=30, presence_penalty=1.0, seed=4, logprobs=3)
    one.begin(PROMPT, (), 20, choosing)
    tokens = list(PROMPT)
    for _ in range(6):
        right = said_next(one, tokens)
        verdict = one.verify(TokenTree.build([right, right ^ 1], [-1, -1], [-1.0, -1.0]))
        emitted = [right, verdict.bonus] if verdict.path else [verdict.bonus]
        assert [each.token_id for each in verdict.logprobs] == emitted
        for each in verdict.logprobs:
            expected = plain.logprobs(tuple(tokens))
            assert each.logprob == pytest.approx(expected[each.token_id], abs=1e-4)
            best = np.argsort(-expected)[:3]
            assert [token for token, _ in each.top] == best.tolist()
            assert [value for _, value in each.top] == pytest.approx(expected[best], abs=1e-4)
            tokens.append(each.token_id)


def said_next(one: OneText, tokens: list[int]) -> int:
    """What the request is going to choose, found by another request of the same seed."""
    other, _ = target_of(one.target._checkpoint.path)
    other.begin(PROMPT, (), 40, one.text.request.choosing)
    other.text.tokens[:] = tokens
    return other.verify(TokenTree.empty()).bonus


def test_the_drafts_candidates_are_the_arg_max_of_its_perturbed_logits() -> None:
    rng = np.random.default_rng(1)
    logits = -np.sort(-rng.normal(size=(4, 50)), axis=1).astype(np.float32)
    tokens = np.stack([rng.permutation(200)[:50] for _ in range(4)])
    positions, noise = np.array([5, 5, 9, 2**20]), Noise(7, 200)
    choosing = Choosing(temperature=0.8, top_k=40, top_p=0.95, min_p=0.001, seed=7)
    ids, logprobs = perturbed(tokens, logits, positions, choosing, noise, 10)
    for row in range(4):
        scores = logits[row].astype(np.float64) / 0.8
        chances = np.exp(scores) / np.exp(scores).sum()
        kept = (np.arange(50) < 40) & (np.cumsum(chances) - chances < 0.95) & (chances >= 0.001 * chances[0])
        keyed = np.where(kept, scores + Noise(7, 200).row(positions[row])[tokens[row]], -np.inf)
        assert ids[row].tolist() == tokens[row][np.argsort(-keyed)[:10]].tolist()
        expected = np.sort(keyed)[::-1][:10] - np.log(np.exp(keyed).sum())
        assert logprobs[row] == pytest.approx(expected, abs=1e-5)


def test_the_noise_is_the_same_for_ever() -> None:
    """A seed in somebody's notes must give the same text with the next version."""
    found = Noise(42, 5).row(7)
    assert found == pytest.approx(EXPECTED, abs=1e-12)
    assert Noise(42, 1000).row(7)[:5] == pytest.approx(EXPECTED, abs=1e-12)  # whatever the vocabulary
    assert not np.allclose(Noise(42, 5).row(8), found) and not np.allclose(Noise(43, 5).row(7), found)


EXPECTED = [0.840081131479938, 2.101264281378111, 0.5258192041873639, 3.033033036263102, 0.12344468823439923]
