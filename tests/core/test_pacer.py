import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmcad_actors.core.pacer import BranchPacer, branches_of
from llmcad_actors.core.tree import ROOT
from tests.core.drafting import path_of, step

weights = st.lists(st.integers(3, 20), min_size=1, max_size=6)


def steady_growth(confidences: list[float], num_nodes: int) -> dict[int, int]:
    """Branches that never lose confidence: tokens owned by each, by the branch's first token."""
    pacer = BranchPacer(num_nodes, threshold=1e-3)
    order = np.argsort(-np.array(confidences), kind="stable")
    pacer.expand([ROOT], order[None], np.log(np.array(confidences)[order])[None])
    while nodes := pacer.next_nodes(1):
        pacer.expand(nodes, np.array([[0]]), np.array([[0.0]]))
    owned = dict.fromkeys(range(len(confidences)), 0)
    for node in range(len(pacer)):
        owned[path_of(pacer, node)[0]] += 1
    return owned


@given(weights, st.integers(10, 60))
def test_lengths_are_max_min_fair_within_one_token(parts: list[int], num_nodes: int) -> None:
    confidences = [part / sum(parts) for part in parts]
    owned = steady_growth(confidences, num_nodes)
    assert sum(owned.values()) == num_nodes
    starved = 0.0
    for branch, confidence in enumerate(confidences):
        deserved = num_nodes * confidence
        if owned[branch] > 1:  # opening it is not the pacer's choice, extending it is
            assert owned[branch] <= deserved + 1
        starved = max(starved, deserved - owned[branch])
    assert starved <= max(1.0, sum(1 - c for c in confidences))


@given(st.integers(1, 6), st.integers(6, 60))
def test_equal_branches_differ_by_one_token_at_most(count: int, num_nodes: int) -> None:
    owned = steady_growth([1 / count] * count, num_nodes)
    assert max(owned.values()) - min(owned.values()) <= 1


@given(st.integers(0, 10_000), st.integers(1, 15))
def test_the_branch_extended_is_the_one_that_lacks_most(seed: int, steps: int) -> None:
    pacer = BranchPacer(40, threshold=0.15)
    for _ in range(steps):
        step(pacer, seed)
    chosen = pacer.next_nodes(1)
    if not chosen:
        return
    tree, ids = pacer.submission()
    if len(ids) != len(pacer):
        return
    owner: dict[int, int] = {}
    for node in range(len(tree)):
        parent = int(tree.parents[node])
        continues = parent != ROOT and tree.children(parent)[0] == node
        owner[node] = owner[parent] if continues else node
    tips = {owner[node]: node for node in range(len(tree))}
    total = sum(float(np.exp(tree.cumulative[tip])) for tip in tips.values())
    lacks = {
        tip: len(tree) * float(np.exp(tree.cumulative[tip])) / total - list(owner.values()).count(branch)
        for branch, tip in tips.items()
    }
    assert lacks[chosen[0]] == pytest.approx(max(lacks.values()))
    assert set(tips.values()) == {i for i in range(len(pacer)) if not pacer.is_expanded(i)}


def test_only_candidates_above_the_threshold_open_branches_and_the_best_always_goes_on() -> None:
    pacer = BranchPacer(20, threshold=0.3)
    pacer.expand([ROOT], np.array([[5, 6, 7]]), np.log([[0.5, 0.35, 0.15]]))
    assert len(pacer) == 2
    pacer.expand([1], np.array([[8, 9]]), np.log([[0.2, 0.1]]))
    assert len(pacer) == 3 and path_of(pacer, 2) == (6, 8)


def test_a_step_extends_as_many_branches_as_the_batch_says() -> None:
    pacer = BranchPacer(20, threshold=0.1, batch=2)
    pacer.expand([ROOT], np.array([[5, 6, 7]]), np.log([[0.5, 0.3, 0.2]]))
    assert pacer.next_nodes(8) == [0, 1] and pacer.next_nodes(1) == [0]


def test_the_pacer_stops_at_its_number_of_nodes_and_goes_on_beyond() -> None:
    pacer = BranchPacer(2, threshold=0.1)
    pacer.expand([ROOT], np.array([[5, 6, 7]]), np.log([[0.5, 0.3, 0.2]]))
    assert pacer.next_nodes(8) == [] and pacer.growth().exhausted
    assert len(pacer.submission()[0]) == 2
    assert pacer.next_nodes(8, beyond=True) == [0]


def test_a_branch_is_named_after_its_first_node() -> None:
    # 0 and 1 start at the root, 2 continues 0, 3 leaves it, 4 continues 3, 5 continues 1
    parents = np.array([-1, -1, 0, 0, 3, 1], np.int32)
    assert branches_of(parents).tolist() == [0, 1, 0, 3, 3, 1]
