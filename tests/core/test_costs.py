from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmcad_actors.core.costs import CostModel, Costs
from llmcad_actors.core.round import Drafting, PassStats

seconds = st.floats(1e-4, 10)
costs = st.builds(Costs, seconds, seconds, seconds, st.floats(0, 0.1), seconds, seconds)


def drafted(steps: int, seconds: float, catch_up_s: float = 0.0) -> Drafting:
    return Drafting({}, 1.0, steps, steps, seconds, catch_up_s)


def checked(seconds: float, stall_s: float, compute_s: float, rows: int) -> PassStats:
    return PassStats(seconds, stall_s, compute_s, rows)


def simulated_round(drafting: float, window: float, read: float, compute: float) -> float:
    """A round, in small steps of time: the disk reads while its window has room or the pass runs."""
    now, unread, tick = 0.0, read, 1e-3
    while now < drafting:
        now += tick
        if read - unread < window:
            unread -= tick
    start = now
    while unread > 0 or now - start < compute:
        now, unread = now + tick, unread - tick
    return now


@given(*[st.floats(0, 1)] * 4)
def test_a_round_takes_what_a_simulated_disk_and_draft_take(
    drafting: float, window: float, read: float, compute: float
) -> None:
    window = min(window, read)
    found = Costs(0.01, read, compute, 0.0, hidden_s=window, drafted_s=drafting).round_seconds(0)
    assert float(found) == pytest.approx(simulated_round(drafting, window, read, compute), abs=6e-3)


@given(costs, st.integers(0, 300))
def test_a_round_is_a_pass_when_nothing_was_drafted(cost: Costs, nodes: int) -> None:
    fresh = Costs(cost.draft_step_s, cost.pass_read_s, cost.pass_base_s, cost.pass_node_s, cost.hidden_s)
    assert fresh.round_seconds(nodes) == fresh.pass_seconds(nodes)


@given(costs, st.floats(0, 5))
def test_drafting_more_is_never_free_of_time_it_does_not_hide(cost: Costs, more: float) -> None:
    longer = float(cost.round_seconds(10, more)) - float(cost.round_seconds(10))
    assert -1e-9 <= longer <= more + 1e-9


def test_drafting_is_free_while_reading_is_the_slower_half() -> None:
    cost = Costs(0.01, pass_read_s=1.0, pass_base_s=0.1, pass_node_s=0.001, hidden_s=0.5)
    assert cost.round_seconds(32, 0.5) == pytest.approx(1.0)
    assert cost.round_seconds(32, 0.7) == pytest.approx(1.2)
    computing = Costs(0.01, pass_read_s=0.1, pass_base_s=1.0, pass_node_s=0.001, hidden_s=0.1)
    assert computing.round_seconds(0, 0.05) == pytest.approx(1.05)


def test_nodes_are_free_until_computing_is_the_slower_half() -> None:
    cost = Costs(0.01, pass_read_s=1.0, pass_base_s=0.1, pass_node_s=0.01)
    np.testing.assert_allclose(cost.pass_seconds(np.array([0, 90, 100])), [1.0, 1.0, 1.1])


def test_a_prompts_rows_are_computed_too_and_only_once() -> None:
    costs = Costs(draft_step_s=0.01, pass_read_s=1.0, pass_base_s=0.5, pass_node_s=0.02, pending_rows=300)
    assert costs.pass_seconds(10) == pytest.approx(0.5 + 0.02 * 310)
    assert costs.without_prompt().pass_seconds(10) == pytest.approx(1.0)
    assert CostModel().costs(pending_rows=7).pending_rows == 7


def test_the_wait_for_the_disk_is_what_computing_leaves_of_a_pass() -> None:
    costs = Costs(draft_step_s=0.01, pass_read_s=2.0, pass_base_s=0.5, pass_node_s=0.05, hidden_s=1.0)
    assert costs.waits_for_disk(10) == pytest.approx(0.5)
    assert costs.waits_for_disk(100) == 0.0
    assert replace(costs, overlaps=False).waits_for_disk(10) == pytest.approx(2 / 3)


def test_before_any_observation_the_costs_are_sensible() -> None:
    cost = CostModel().costs()
    assert 0 < cost.draft_step_s < 0.1 < cost.pass_read_s
    assert cost.pass_base_s > 0 and cost.pass_node_s > 0 and cost.hidden_s == cost.drafted_s == 0.0
    assert CostModel().costs(0.25).drafted_s == 0.25
    assert CostModel(window_share=0.3).costs().hidden_s == pytest.approx(0.3 * cost.pass_read_s)


def test_the_first_observation_replaces_the_guess() -> None:
    model = CostModel().observe_step(0.5).observe_pass(20, 3.0, 3.0, 0.4)
    assert model.costs().draft_step_s == 0.5 and model.costs().pass_read_s == 3.0
    assert model.costs().pass_base_s + 19 * model.costs().pass_node_s == pytest.approx(0.4)


@given(st.floats(0.01, 1), st.floats(1e-4, 0.02), st.lists(st.integers(1, 129), min_size=30, max_size=60))
def test_computing_is_learnt_as_a_line_over_rows(base: float, per_row: float, rows: list[int]) -> None:
    model = CostModel()
    for count in [8, 100, *rows, 8, 100]:
        model = model.observe_pass(count, 20.0, 20.0, base + per_row * count)
    predicted = model.costs().pass_base_s + model.costs().pass_node_s * 49
    assert predicted == pytest.approx(base + per_row * 50, rel=0.1)
    assert model.costs().pass_node_s == pytest.approx(per_row, rel=0.25, abs=base / 500)


@given(st.lists(st.tuples(st.integers(1, 2000), seconds, seconds, seconds), min_size=1, max_size=20))
def test_no_cost_is_ever_negative(passes: list[tuple[int, float, float, float]]) -> None:
    model = CostModel()
    for rows, took, read, compute in passes:
        model = model.observe_pass(rows, took, read, compute)
    cost = model.costs()
    assert cost.pass_node_s >= 0 and cost.pass_base_s >= -1e-9 and cost.pass_read_s > 0
    assert float(cost.pass_seconds(0)) > 0


def test_a_change_of_speed_is_followed_within_some_passes() -> None:
    model = CostModel()
    for took in [1.0] * 10 + [2.0] * 15:
        model = model.observe_step(took / 100).observe_pass(32, took, took, 0.1)
    assert model.costs().pass_read_s == pytest.approx(2.0, rel=0.05)
    assert model.costs().draft_step_s == pytest.approx(0.02, rel=0.05)


def test_a_pass_that_waits_shows_the_time_of_reading() -> None:
    model = CostModel().observe_pass(32, seconds=4.0, read_seconds=0.5, compute_seconds=1.0)
    assert model.costs().pass_read_s == 4.0
    model = CostModel().observe_pass(32, seconds=1.0, read_seconds=0.5, compute_seconds=1.0)
    assert model.costs().pass_read_s == 0.5


def test_a_round_teaches_steps_computing_and_waiting() -> None:
    model = CostModel().after(drafted(4, 0.2), checked(2.0, 1.5, 0.5, 33))
    assert model.costs().draft_step_s == pytest.approx(0.05)
    assert model.costs().pass_read_s == 2.0 and model.mean_compute_s == 0.5 and model.mean_rows == 33
    assert CostModel().after(drafted(0, 0.0), checked(2.0, 1.5, 0.5, 33)).num_steps == 0


def test_a_round_whose_pass_never_waits_bounds_the_reading_by_the_pass() -> None:
    model = CostModel(read_s=5.0).after(drafted(1, 0.1), checked(2.0, 0.0, 2.0, 33))
    assert model.costs().pass_read_s == 2.0


def test_reading_hidden_behind_drafting_counts_as_reading() -> None:
    model = CostModel(window_share=0.5, read_s=2.0).after(drafted(10, 0.6), checked(1.4, 1.0, 0.4, 33))
    assert model.costs().pass_read_s == pytest.approx(2.0)


def test_halves_that_take_turns_add_up() -> None:
    """Under a cap with room for one shard: the rest of a pass is reading, however long the computing."""
    model = CostModel(overlaps=False)
    for rows, computing in ((16, 0.5), (128, 4.0), (16, 0.5), (128, 4.0)):
        model = model.after(drafted(1, 0.01), checked(computing + 0.7, 0.7, computing, rows))
    cost = model.costs()
    assert cost.pass_read_s == pytest.approx(0.7)
    assert cost.pass_seconds(127) == pytest.approx(4.7, rel=0.05)
    assert cost.round_seconds(15, 0.1) == pytest.approx(0.1 + 1.2, rel=0.05)
    assert cost.round_seconds(127) - cost.round_seconds(15) == pytest.approx(3.5, rel=0.05)  # nodes are never free


def test_passes_of_one_row_do_not_make_the_model_forget_what_a_trees_rows_cost() -> None:
    model = CostModel()
    for rows in (16, 64, 16, 64):
        model = model.observe_pass(rows, 20.0, 20.0, 0.5 + 0.01 * rows)
    before = model.costs()
    for _ in range(100):
        model = model.observe_pass(1, 20.0, 20.0, 0.3)
    assert model.costs().pass_node_s == pytest.approx(before.pass_node_s, rel=0.1)
    assert model.costs().plain_compute_s == pytest.approx(0.3)


def test_one_trees_pass_and_one_row_are_a_line() -> None:
    model = CostModel().observe_pass(16, 1.0, 0.0, 1.0).observe_pass(1, 0.25, 0.0, 0.25)
    assert model.costs().pass_seconds([0, 15, 30]) == pytest.approx([0.25, 1.0, 1.75])
    assert model.costs().plain_pass_s == pytest.approx(0.25)


def test_a_plain_pass_takes_as_long_as_its_slower_half() -> None:
    costs = Costs(0.01, pass_read_s=1.0, pass_base_s=0.5, pass_node_s=0.02, plain_compute_s=0.2)
    assert costs.plain_pass_s == 1.0
    assert replace(costs, overlaps=False).plain_pass_s == pytest.approx(1.2)
    assert replace(costs, pass_read_s=0.0).plain_pass_s == pytest.approx(0.2)
    assert replace(costs, pass_read_s=0.0, drafted_s=0.1).seconds_without_nodes() == pytest.approx(0.3)


def test_a_step_that_was_never_timed_is_as_much_faster_than_a_plain_pass_as_planned() -> None:
    planned = CostModel(draft_step_s=0.01, plain_compute_s=0.1)
    slower = planned.observe_pass(1, 0.3, 0.0, 0.3)
    assert slower.costs().draft_step_s == pytest.approx(0.03)
    assert slower.observe_step(0.02).observe_pass(1, 9.0, 0.0, 9.0).costs().draft_step_s == pytest.approx(0.02)


def test_catching_up_is_no_draft_step() -> None:
    model = CostModel().after(drafted(5, 1.2, catch_up_s=1.0), checked(2.0, 1.5, 0.5, 33))
    assert model.costs().draft_step_s == pytest.approx(0.05)
    assert CostModel().after(drafted(1, 1.0, catch_up_s=1.0), checked(2.0, 1.5, 0.5, 33)).num_steps == 0
