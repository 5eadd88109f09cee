import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from llmcad_actors.core.calibration import Calibration

probabilities = st.lists(st.floats(0, 1), min_size=1, max_size=40).map(np.array)
rounds = st.lists(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=20), max_size=8)


def fitted(observed: list[list[tuple[float, bool]]]) -> Calibration:
    calibration = Calibration()
    for nodes in observed:
        calibration = calibration.observe(np.array([p for p, _ in nodes]), np.array([a for _, a in nodes]))
    return calibration


@given(probabilities)
def test_without_observations_the_draft_is_believed(said: np.ndarray) -> None:
    np.testing.assert_array_equal(Calibration().apply(said), said)


@given(rounds, probabilities)
def test_a_likelier_node_never_becomes_less_likely(observed: list[list[tuple[float, bool]]], said: np.ndarray) -> None:
    corrected = fitted(observed).apply(np.sort(said))
    assert np.all(np.diff(corrected) >= -1e-12)


@given(rounds.filter(bool), probabilities)
def test_corrected_values_are_probabilities_above_zero(
    observed: list[list[tuple[float, bool]]], said: np.ndarray
) -> None:
    corrected = fitted(observed).apply(said)
    assert corrected.shape == said.shape and np.all(corrected > 0) and np.all(corrected <= 1)


def test_an_over_confident_draft_is_corrected_to_what_happens() -> None:
    rng, calibration = np.random.default_rng(0), Calibration()
    for _ in range(200):
        said = rng.uniform(0.02, 0.98, 60)
        calibration = calibration.observe(said, rng.random(60) < said**2)
    said = np.array([0.1, 0.3, 0.5, 0.7, 0.9])
    np.testing.assert_allclose(calibration.apply(said), said**2, atol=0.06)


def test_a_draft_that_is_right_stays_believed() -> None:
    rng, calibration = np.random.default_rng(0), Calibration()
    for _ in range(200):
        said = rng.uniform(0.001, 0.999, 60)
        calibration = calibration.observe(said, rng.random(60) < said)
    said = np.array([0.1, 0.3, 0.5, 0.7, 0.9])
    np.testing.assert_allclose(calibration.apply(said), said, atol=0.06)


def test_a_draft_that_is_quite_sure_and_wrong_at_times_is_not_believed_to_be_sure() -> None:
    calibration = Calibration()
    for _ in range(100):
        calibration = calibration.observe(np.full(10, 1.0 - 1e-7), np.arange(10) < 8)
    assert 0.75 < calibration.apply(np.array([1.0 - 1e-7]))[0] < 0.85
    assert 0.75 < calibration.apply(np.array([1.0]))[0] < 0.85


def test_one_observation_moves_little_and_many_move_much() -> None:
    once = Calibration().observe(np.array([0.5]), np.array([False]))
    often = fitted([[(0.5, False)]] * 50)
    assert 0.4 < once.apply(np.array([0.5]))[0] < 0.5
    assert often.apply(np.array([0.5]))[0] < 0.25


def test_the_past_fades() -> None:
    wrong, right = [[(0.5, False)] * 10] * 50, [[(0.5, True)] * 10] * 100
    assert fitted(wrong + right).apply(np.array([0.5]))[0] > 0.9


def test_observing_leaves_the_old_value_as_it_was() -> None:
    calibration = Calibration()
    calibration.observe(np.array([0.5]), np.array([True]))
    assert calibration == Calibration()
