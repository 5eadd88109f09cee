"""How much surer the target is than the draft is found from its choices."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcad_actors.core.sharpness import Sharpness

TOKENS = 40


def candidates(seed: int, rows: int, kept: int) -> np.ndarray:
    """Log-probabilities [rows, kept] of the likeliest of 40 tokens, descending."""
    logits = np.random.default_rng(seed).normal(0, 2, (rows, TOKENS))
    logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    return -np.sort(-logprobs, axis=1)[:, :kept]


def taught(logprobs: np.ndarray, exponent: float, seed: int, kept: int) -> Sharpness:
    """After choices of a target that draws from the draft's probabilities to the power `exponent`."""
    rng, sharpness = np.random.default_rng(seed), Sharpness()
    for row in logprobs:
        weights = np.exp(exponent * row)
        choice = int(rng.choice(len(row), p=weights / weights.sum()))
        sharpness = sharpness.after(row[:kept], choice if choice < kept else None)
    return sharpness


@settings(max_examples=30)
@given(st.integers(0, 1000), st.sampled_from([0.7, 1.0, 2.0, 3.0]), st.sampled_from([8, 16, TOKENS]))
def test_the_targets_exponent_is_found(seed: int, exponent: float, kept: int) -> None:
    found = taught(candidates(seed, 400, TOKENS), exponent, seed, kept).exponent
    assert exponent / 1.6 < found < exponent * 1.6


def test_a_few_choices_are_enough_for_most_of_it() -> None:
    row = np.log([0.4, 0.2, 0.1])
    sharpness = Sharpness()
    for _ in range(12):
        sharpness = sharpness.after(row, 0)
    assert sharpness.exponent > 2.0
    for _ in range(40):
        sharpness = sharpness.after(row, 2)
    assert sharpness.exponent < 1.0


@given(st.integers(0, 1000), st.integers(1, 16), st.floats(0.5, 4.0))
def test_sharpened_candidates_are_probabilities_in_the_same_order(seed: int, kept: int, exponent: float) -> None:
    said = candidates(seed, 5, kept).astype(np.float32)
    sharpened = Sharpness(exponent=exponent).apply(said)
    assert sharpened.dtype == said.dtype and sharpened.shape == said.shape
    assert (np.diff(sharpened, axis=1) <= 0).all()
    assert (np.exp(sharpened.astype(np.float64)).sum(axis=1) <= 1 + 1e-5).all()


@given(st.integers(0, 1000), st.integers(1, 16))
def test_the_exponent_of_one_changes_nothing(seed: int, kept: int) -> None:
    said = candidates(seed, 5, kept)
    np.testing.assert_allclose(Sharpness(exponent=1.0).apply(said), said, atol=1e-6)


@given(st.integers(0, 1000), st.floats(1.0, 4.0))
def test_whole_distributions_are_raised_to_the_power(seed: int, exponent: float) -> None:
    said = candidates(seed, 3, TOKENS)
    powers = np.exp(exponent * said)
    expected = powers / powers.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(np.exp(Sharpness(exponent=exponent).apply(said)), expected, rtol=1e-4)


@pytest.mark.parametrize("chosen", [0, None])
def test_a_single_candidate_teaches_without_trouble(chosen: int | None) -> None:
    after = Sharpness().after(np.array([np.log(0.6)]), chosen)
    assert 0.5 <= after.exponent <= 4.0
    certain = Sharpness().after(np.array([0.0]), chosen)
    assert np.isfinite(certain.exponent)
