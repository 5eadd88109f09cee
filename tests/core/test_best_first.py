import heapq
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmcad_actors.core.best_first import BestFirst
from llmcad_actors.core.sharpness import Sharpness
from llmcad_actors.core.tree import ROOT
from tests.core.drafting import VOCAB, candidates, grow, paths_in, step


def most_probable_paths(seed: int, count: int) -> set[tuple[int, ...]]:
    """The `count` most probable prefixes of all, one by one from a heap."""
    waiting: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    found: list[tuple[int, ...]] = []
    while len(found) <= count:
        cost, path = heapq.heappop(waiting)
        found.append(path)
        tokens, logprobs = candidates(seed, path, VOCAB)
        for token, logprob in zip(tokens.tolist(), logprobs.tolist(), strict=True):
            heapq.heappush(waiting, (cost - logprob, (*path, token)))
    return set(found[1:])


@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(1, 9))
def test_an_exhausted_builder_holds_the_most_probable_prefixes_of_all_whatever_the_batch(
    seed: int, max_nodes: int, batch: int
) -> None:
    builder = BestFirst(max_nodes, batch)
    grow(builder, seed)
    assert paths_in(builder.submission()[0]) == most_probable_paths(seed, max_nodes)


@given(st.integers(0, 10_000), st.integers(1, 8))
def test_each_step_runs_the_likeliest_nodes_not_yet_run(seed: int, steps: int) -> None:
    builder = BestFirst(8, batch=3)
    for _ in range(steps):
        step(builder, seed, beyond=True)
    tree, ids = builder.submission()
    chosen = builder.next_nodes(3, beyond=True)
    builder.max_nodes = 10**6
    builder.reroot(ROOT)  # the same nodes, asked anew for all of them
    everything, _ = builder.submission()
    waiting = [i for i in range(len(builder)) if not builder.is_expanded(i)]
    assert chosen == sorted(waiting, key=lambda i: -everything.cumulative[i])[:3]
    assert len(tree) <= 8 and set(ids.tolist()) <= set(range(len(builder)))


def test_growth_stops_where_no_child_could_be_among_the_best() -> None:
    builder = BestFirst(max_nodes=2, batch=4)
    builder.expand([ROOT], np.array([[1, 2, 3]]), np.log([[0.5, 0.3, 0.2]]))
    assert builder.next_nodes(4) == [0]  # children of the second best cannot beat it
    assert builder.next_nodes(4, beyond=True) == [0, 1, 2]
    builder.expand([0], np.array([[4, 5]]), np.log([[0.5, 0.5]]))
    assert builder.next_nodes(4) == [] and builder.growth().exhausted


def test_candidates_that_could_never_matter_are_not_scored() -> None:
    builder = BestFirst(max_nodes=8, children=3)
    builder.expand([ROOT], np.array([[1, 2, 3, 4]]), np.log([[0.9, 0.05, 0.04, 0.01]]))
    builder.expand([0], np.array([[1, 2]]), np.log([[0.99999, 1e-5]]))
    builder.expand([1], np.array([[1, 2]]), np.array([[-50.0, -60.0]]))  # the best one always is
    tokens, parents, _ = builder.rows(np.arange(len(builder)))
    assert tokens.tolist() == [1, 2, 3, 1, 1]
    assert parents.tolist() == [ROOT, ROOT, ROOT, 0, 1]


@pytest.mark.parametrize("share", [0.5, 0.8, 0.95])
def test_the_next_gain_of_a_steady_chain_is_what_the_next_step_gains(share: float) -> None:
    builder = BestFirst(max_nodes=50, batch=1)
    node = ROOT
    for _ in range(6):
        builder.expand([node], np.array([[1]]), np.log([[share]]))
        node = len(builder) - 1
    before = builder.growth()
    builder.expand([node], np.array([[1]]), np.log([[share]]))
    gained = builder.growth().cumulative.sum() - before.cumulative.sum()
    assert before.next_gain == pytest.approx(gained, rel=0.35)


@given(st.integers(0, 300))
def test_the_next_gain_is_about_right_on_the_whole(seed: int) -> None:
    builder = BestFirst(max_nodes=40, batch=4)
    estimated, sums = 0.0, [0.0]
    while not (growth := builder.growth()).exhausted:
        estimated += growth.next_gain
        step(builder, seed)
        sums.append(float(builder.growth().cumulative.sum()))
    assert all(later >= earlier - 1e-9 for earlier, later in pairwise(sums))
    assert 0.5 * sums[-1] < estimated < 2 * sums[-1]


def said(*probabilities: float) -> np.ndarray:
    return np.log(np.array([probabilities], np.float32))


def grown(*, sharpens: bool) -> BestFirst:
    """The root's candidates 1 and 2, and those of 1: 3 and 4."""
    builder = BestFirst(8, batch=1, sharpens=sharpens)
    builder.expand([-1], np.array([[1, 2]]), said(0.5, 0.3))
    builder.expand([0], np.array([[3, 4]]), said(0.6, 0.2))
    return builder


def test_the_targets_choices_sharpen_what_is_scored_from_then_on() -> None:
    builder = grown(sharpens=True)
    first = builder.sharpness.exponent
    three = builder.find(0, 3)
    assert three is not None
    for _ in range(6):
        builder.observe(np.array([0, three]), bonus=9)  # 3 has not been run: what follows it teaches nothing
    assert builder.sharpness.exponent > first
    assert builder.sharpness == taught_by([(said(0.5, 0.3)[0], 0), (said(0.6, 0.2)[0], 0)] * 6)
    builder.reset()
    builder.expand([-1], np.array([[1, 2]]), said(0.5, 0.3))
    tree, _ = builder.submission()
    assert tree.logprobs[0] > np.log(0.7)
    assert builder.growth().last_confidence == pytest.approx(0.5)  # thresholds are on what the draft says


def taught_by(choices: list[tuple[np.ndarray, int | None]]) -> Sharpness:
    sharpness = Sharpness()
    for logprobs, chosen in choices:
        sharpness = sharpness.after(logprobs, chosen)
    return sharpness


def test_a_choice_that_was_no_candidate_teaches_too() -> None:
    builder = grown(sharpens=True)
    builder.observe(np.array([0]), bonus=77)
    assert builder.sharpness == taught_by([(said(0.5, 0.3)[0], 0), (said(0.6, 0.2)[0], None)])


def test_by_default_the_draft_is_taken_at_its_word() -> None:
    builder = grown(sharpens=False)
    before = builder.submission()[0]
    builder.observe(np.array([0]), bonus=3)
    np.testing.assert_allclose(before.logprobs, np.log([0.5, 0.3, 0.6, 0.2]), rtol=1e-6)
    assert builder.sharpness == Sharpness()
