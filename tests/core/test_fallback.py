from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmcad_actors.core.best_first import BestFirst
from llmcad_actors.core.costs import Costs
from llmcad_actors.core.fallback import (
    AdaptiveConfidence,
    FixedDepth,
    FixedTree,
    MarginalThroughput,
    Policy,
    TokenConfidence,
    outcome_of,
)
from llmcad_actors.core.growth import Growth
from llmcad_actors.core.tree import TokenTree
from llmcad_actors.core.worth import Round
from tests.core.drafting import step, trees

COSTS = Costs(draft_step_s=0.01, pass_read_s=1.0, pass_base_s=0.1, pass_node_s=0.001)
GROWTH = Growth(
    steps=3,
    num_nodes=2,
    best_frontier=0.3,
    last_confidence=0.6,
    depth=2,
    exhausted=False,
    cumulative=np.array([0.6, 0.3]),
    next_gain=0.2,
)
CHAIN = TokenTree.build([1, 2, 3, 4], [-1, 0, 1, 2], np.log([0.8, 0.5, 0.5, 0.25]))
POLICIES: list[Policy] = [
    AdaptiveConfidence(),
    FixedDepth(),
    FixedTree(),
    TokenConfidence(),
    MarginalThroughput(),
]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_tree_that_cannot_change_is_verified(policy: Policy) -> None:
    assert not policy.should_verify(GROWTH, COSTS)
    assert policy.should_verify(replace(GROWTH, exhausted=True), COSTS)


@given(trees(), st.data())
def test_the_best_branch_begins_with_the_accepted_path_and_is_the_longest_that_does(
    tree: TokenTree, data: st.DataObject
) -> None:
    path = tree.path(data.draw(st.integers(-1, len(tree) - 1)))
    outcome = outcome_of(tree, path, 0.5)
    assert outcome.best_branch[: len(path)] == path
    agreeing = [tree.path(i) for i in range(len(tree)) if tree.path(i)[: len(path)] == path]
    assert outcome.num_all == max(map(len, agreeing), default=0)
    assert outcome.num_correct == len(path) and outcome.best_branch in [*agreeing, ()]


def test_the_paper_verifies_once_no_branch_is_likelier_than_alpha() -> None:
    policy = AdaptiveConfidence(alpha=0.1)
    assert not policy.should_verify(replace(GROWTH, best_frontier=0.1), COSTS)
    assert policy.should_verify(replace(GROWTH, best_frontier=0.0999), COSTS)


def test_alpha_halves_when_the_whole_branch_was_right() -> None:
    assert AdaptiveConfidence(0.02).after(outcome_of(CHAIN, (0, 1, 2, 3), 0.1)).alpha == 0.01


def test_alpha_rises_by_the_papers_formula_when_some_of_the_branch_was_wrong() -> None:
    after = AdaptiveConfidence(0.02).after(outcome_of(CHAIN, (0,), 0.1))
    assert after.alpha == pytest.approx(0.02 / 0.1 ** (3 / 4))


def test_alpha_rises_by_the_papers_prose_in_the_other_reading() -> None:
    after = AdaptiveConfidence(0.02, "average").after(outcome_of(CHAIN, (0, 1), 0.1))
    assert after.alpha == pytest.approx(0.02 / np.mean([0.2, 0.05]) ** (2 / 4), rel=1e-5)
    assert after.reading == "average"


def test_alpha_stays_where_it_is_when_nothing_was_drafted() -> None:
    assert AdaptiveConfidence(0.02).after(outcome_of(TokenTree.empty(), (), 0.1)).alpha == 0.02


@given(trees(), st.floats(0, 1), st.sampled_from(["power", "average"]), st.data())
def test_alpha_never_leaves_its_range(tree: TokenTree, confidence: float, reading: str, data: st.DataObject) -> None:
    policy = AdaptiveConfidence(data.draw(st.floats(1e-9, 0.999)), reading)
    for _ in range(40):
        node = data.draw(st.integers(-1, len(tree) - 1)) if len(tree) else -1
        policy = policy.after(outcome_of(tree, tree.path(node), confidence))
        assert 1e-9 <= policy.alpha <= 0.999


def test_plain_speculation_verifies_at_its_depth() -> None:
    assert not FixedDepth(3).should_verify(replace(GROWTH, depth=2), COSTS)
    assert FixedDepth(3).should_verify(replace(GROWTH, depth=3), COSTS)


def test_big_little_decoding_verifies_when_the_draft_is_unsure_or_deep() -> None:
    policy = TokenConfidence(threshold=0.4, max_depth=5)
    assert not policy.should_verify(replace(GROWTH, last_confidence=0.4, depth=4), COSTS)
    assert policy.should_verify(replace(GROWTH, last_confidence=0.39), COSTS)
    assert policy.should_verify(replace(GROWTH, depth=5), COSTS)


@pytest.mark.parametrize("policy", POLICIES[:4])
def test_policies_without_a_cost_model_submit_every_node(policy: Policy) -> None:
    assert policy.choose_nodes(np.array([0.5, 0.1, 0.0]), COSTS) == 3


@pytest.mark.parametrize("policy", POLICIES[1:4])
def test_fixed_policies_learn_nothing(policy: Policy) -> None:
    assert policy.after(outcome_of(CHAIN, (0,), 0.1)) == policy


def test_drafting_goes_on_while_it_buys_tokens_cheaper_than_the_round_does() -> None:
    # A = 1.9 tokens in R = 1 s; a step costs c: it pays as long as 0.2 / c > 1.9, c < 0.105
    assert not MarginalThroughput().should_verify(GROWTH, replace(COSTS, draft_step_s=0.10))
    assert MarginalThroughput().should_verify(GROWTH, replace(COSTS, draft_step_s=0.11))


def test_a_step_that_drafting_ahead_would_make_anyway_counts_for_less() -> None:
    # of its 0.2 tokens two thirds count: it pays as long as 0.133 / c > 1.9, c < 0.070
    ahead = replace(COSTS, drafts_ahead=True)
    assert not MarginalThroughput().should_verify(GROWTH, replace(ahead, draft_step_s=0.065))
    assert MarginalThroughput().should_verify(GROWTH, replace(ahead, draft_step_s=0.075))
    assert not MarginalThroughput().should_verify(GROWTH, replace(COSTS, draft_step_s=0.075))


def test_beside_a_pass_that_leaves_no_room_to_draft_ahead_a_step_counts_whole() -> None:
    # 0.2 tokens in 0.01 s and 0.67 nodes of 0.14 s, 1.9 a second; the round has 1.9 in 1.28 s
    computing = replace(COSTS, pass_read_s=0.0, pass_base_s=1.0, pass_node_s=0.14, drafts_ahead=True)
    assert not MarginalThroughput().should_verify(GROWTH, computing)


def test_a_step_hidden_behind_reading_pays_if_it_gains_anything() -> None:
    slow = replace(COSTS, draft_step_s=0.5)
    assert MarginalThroughput().should_verify(GROWTH, slow)
    assert not MarginalThroughput().should_verify(GROWTH, replace(slow, hidden_s=0.6))
    assert MarginalThroughput().should_verify(replace(GROWTH, next_gain=0.0), replace(slow, hidden_s=0.6))


def test_time_spent_on_drafting_hides_no_longer() -> None:
    costs = replace(COSTS, draft_step_s=0.5, hidden_s=0.6, drafted_s=0.5)
    assert MarginalThroughput().should_verify(GROWTH, costs)


def test_nodes_that_must_be_computed_count_against_a_step() -> None:
    # computing is the slower half: 0.1 tokens take at least 0.1 / 0.05 of a node
    computing = replace(COSTS, pass_read_s=0.0, draft_step_s=0.0, pass_base_s=1.0)
    full = replace(GROWTH, num_nodes=15, cumulative=np.full(15, 0.06), best_frontier=0.05, next_gain=0.1)
    assert not MarginalThroughput().should_verify(full, replace(computing, pass_node_s=0.02))
    assert MarginalThroughput().should_verify(full, replace(computing, pass_node_s=0.1))


def test_a_tree_that_is_next_to_worthless_is_not_submitted() -> None:
    computing = replace(COSTS, pass_read_s=0.0, draft_step_s=0.0, pass_base_s=1.0, pass_node_s=0.1)
    assert MarginalThroughput().choose_nodes(np.full(15, 0.01), computing) == 0
    assert MarginalThroughput().choose_nodes(np.full(15, 0.05), computing) == 1
    faster = replace(computing, plain_compute_s=0.5)
    assert MarginalThroughput().choose_nodes(np.full(15, 0.05), faster) == 0


def test_a_round_without_a_tree_teaches_nothing_of_the_draft() -> None:
    learnt = MarginalThroughput().after(outcome_of(CHAIN, (0, 1), 0.1))
    assert learnt.after(outcome_of(TokenTree.empty(), (), 1.0)) == learnt


def test_only_the_default_policy_ever_leaves_the_draft_out() -> None:
    dear = replace(COSTS, draft_step_s=10.0)
    policies: list[Policy] = [AdaptiveConfidence(), FixedDepth(), FixedTree(), TokenConfidence()]
    for policy in policies:
        assert policy.after_round(Round(True, 1, 100.0)).should_draft(dear, unseen=10**6, left=1)
    assert not MarginalThroughput().should_draft(dear, unseen=1, left=100)


def test_a_draft_known_to_be_over_confident_is_asked_for_less() -> None:
    costs = replace(COSTS, draft_step_s=0.09)
    learnt = MarginalThroughput()
    assert not learnt.should_verify(GROWTH, costs)
    for _ in range(60):
        learnt = learnt.after(outcome_of(CHAIN, (), 0.1))
    assert learnt.should_verify(GROWTH, costs)


def test_what_is_accepted_is_learnt_node_by_node() -> None:
    after = MarginalThroughput().after(outcome_of(CHAIN, (0, 1), 0.1))
    assert sum(after.calibration.nodes) == 4 and sum(after.calibration.accepted) == 2
    assert sum(after.calibration.predicted) == pytest.approx(0.8 + 0.4 + 0.2 + 0.05)


@given(
    st.lists(st.floats(0, 1), max_size=60),
    st.builds(Costs, st.just(0.01), *[st.floats(1e-3, 2)] * 2, st.floats(0, 0.2), *[st.floats(0, 1)] * 2),
)
def test_the_number_of_nodes_submitted_has_the_best_rate(probabilities: list[float], costs: Costs) -> None:
    cumulative = np.sort(np.array(probabilities))[::-1]
    count = MarginalThroughput().choose_nodes(cumulative, costs)
    seconds = [float(costs.round_seconds(n)) for n in range(len(cumulative) + 1)]
    rates = [(1 + cumulative[:n].sum()) / seconds[n] for n in range(len(cumulative) + 1)]
    if count == 0:  # it would not pay if three times as many were accepted
        some = int(np.argmax(rates)) or min(1, len(cumulative))
        assert (1 + 3 * cumulative[:some].sum()) / seconds[some] <= 1 / seconds[0] + 1e-9
    else:
        assert rates[count] == pytest.approx(max(rates[1:]))


def test_a_pass_bound_by_reading_takes_every_node_and_one_bound_by_computing_few() -> None:
    cumulative = np.geomspace(0.9, 1e-3, 100)
    assert MarginalThroughput().choose_nodes(cumulative, COSTS) == 100
    computing = replace(COSTS, pass_read_s=0.0, pass_node_s=0.05)
    assert 0 < MarginalThroughput().choose_nodes(cumulative, computing) < 30


def test_what_a_prompt_costs_is_spent_anyway() -> None:
    """Beside 300 rows of a prompt, further nodes still have to come at the rate of the rounds after it."""
    computing = replace(COSTS, pass_read_s=0.0, pass_base_s=0.5, pass_node_s=0.025)
    cumulative = np.geomspace(0.9, 1e-3, 200)
    usual = MarginalThroughput().choose_nodes(cumulative, computing)
    beside_a_prompt = MarginalThroughput().choose_nodes(cumulative, replace(computing, pending_rows=299))
    assert usual == beside_a_prompt == 27
    cheap = replace(computing, pass_node_s=1e-5)
    assert MarginalThroughput().choose_nodes(cumulative, replace(cheap, pending_rows=299)) > 150


def test_a_step_beside_a_prompt_is_worth_what_it_is_worth_later() -> None:
    # 1.9 tokens in 1 s: as without the prompt, though the pass takes 6 s now
    prompt = replace(COSTS, pending_rows=5900)
    assert not MarginalThroughput().should_verify(GROWTH, replace(prompt, draft_step_s=0.10))
    assert MarginalThroughput().should_verify(GROWTH, replace(prompt, draft_step_s=0.11))


@pytest.mark.parametrize("draft_step_s", [0.002, 0.02, 0.1, 0.3])
def test_the_default_policy_stops_near_the_best_moment(draft_step_s: float) -> None:
    """Over many drafts: the rate where it stops against the best rate of all steps, in hindsight."""
    reached, best = 0.0, 0.0
    for seed in range(30):
        builder, rates, stopped = BestFirst(64, batch=4), [], None
        for steps in range(40):
            growth = builder.growth()
            costs = Costs(draft_step_s, 1.0, 0.1, 0.004, drafted_s=steps * draft_step_s)
            count = MarginalThroughput().choose_nodes(growth.cumulative, costs)
            rates.append((1 + growth.cumulative[:count].sum()) / float(costs.round_seconds(count)))
            if stopped is None and MarginalThroughput().should_verify(growth, costs):
                stopped = len(rates) - 1
            step(builder, seed)
        assert stopped is not None
        reached, best = reached + rates[stopped], best + max(rates)
    assert reached > 0.93 * best
