"""Fallback policies: when to stop drafting and call the target (paper, section 3), and whether to draft at all.

A policy is a value. It answers `should_draft` before each round and `should_verify` after each draft step; after a
verdict and a round it returns its successor. It knows the facts of a growing tree and the costs of a round, no model.
"""

from dataclasses import dataclass, field, replace
from typing import Protocol, Self

import numpy as np

from llmcad_actors.core.calibration import Calibration
from llmcad_actors.core.costs import Costs
from llmcad_actors.core.fixed_expansion import SPECINFER_WIDTHS
from llmcad_actors.core.growth import Growth
from llmcad_actors.core.provisional import is_worth_it
from llmcad_actors.core.tree import ROOT, TokenTree, is_below
from llmcad_actors.core.worth import Round, Worth

_LEAST_CONFIDENCE = 1e-9
_ALPHA_RANGE = (1e-9, 0.999)
_HOPE = 3.0  # times what a tree promises, before a plain pass is made instead: `Worth` judges by what rounds bring
_OWN_SHARE = 2 / 3  # of a step's gain, that drafting ahead does not make up for


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a submitted tree."""

    tree: TokenTree
    path: tuple[int, ...]  # accepted nodes
    confidence: float  # T_c when the tree was submitted
    best_branch: tuple[int, ...]  # of the branches that agree longest with the target, the longest

    @property
    def num_all(self) -> int:
        """The paper's N_all: tokens on the branch that matched best."""
        return len(self.best_branch)

    @property
    def num_correct(self) -> int:
        """The paper's N_correct: tokens on it that the target accepted."""
        return len(self.path)


def outcome_of(tree: TokenTree, path: tuple[int, ...], confidence: float) -> Outcome:
    """The accepted path is a prefix of the branch that matched best, which may go on below it."""
    end = path[-1] if path else ROOT
    below = np.flatnonzero(is_below(tree.parents, end))
    leaf = int(below[np.argmax(tree.depths[below])]) if len(below) else end
    return Outcome(tree, path, confidence, tree.path(leaf))


class Policy(Protocol):
    def should_draft(self, costs: Costs, unseen: int, left: int) -> bool:
        """Whether to draft in this round; else its pass runs one row.

        unseen: tokens that the draft would have to read first. left: tokens still to come.
        """

    def should_end_draft(self, costs: Costs) -> bool:
        """Whether to do without the draft for good, so that its memory can hold layers of the target."""

    def should_verify(self, growth: Growth, costs: Costs) -> bool:
        """Whether to hand the tree over now, or to draft one step more."""

    def choose_nodes(self, cumulative: np.ndarray, costs: Costs) -> int:
        """How many of the nodes, given by descending cumulative probability, to submit."""

    def after(self, outcome: Outcome) -> Self:
        """The policy for the next round, by what became of the tree."""

    def after_round(self, done: Round) -> Self:
        """The policy for the next round, by what this one brought in how much time."""


class _SubmitsAll:
    """What most policies share: every round is drafted, every grown node is submitted, and nothing is learnt.

    They are there to be compared, so they do what they say, also where it does not pay.
    """

    __slots__ = ()

    def should_draft(self, costs: Costs, unseen: int, left: int) -> bool:
        return True

    def should_end_draft(self, costs: Costs) -> bool:
        return False

    def choose_nodes(self, cumulative: np.ndarray, costs: Costs) -> int:
        return len(cumulative)

    def after(self, outcome: Outcome) -> Self:
        return self

    def after_round(self, done: Round) -> Self:
        return self


@dataclass(frozen=True, slots=True)
class AdaptiveConfidence(_SubmitsAll):
    """The paper's policy: verify once no branch is more probable than alpha, which follows the verdicts.

    All right: alpha halves. Else alpha is divided by x ** ((N_all - N_correct) / N_all), which raises it. The
    formula's x is T_c ("power"); the paper's prose says the average cumulative confidence of the tokens from the
    wrong one on ("average").
    """

    alpha: float = 0.01
    reading: str = "power"

    def should_verify(self, growth: Growth, costs: Costs) -> bool:
        return growth.exhausted or growth.best_frontier < self.alpha

    def after(self, outcome: Outcome) -> Self:
        if not outcome.num_all:
            return self
        alpha = 0.5 * self.alpha
        if outcome.num_correct < outcome.num_all:
            wrong_share = (outcome.num_all - outcome.num_correct) / outcome.num_all
            alpha = self.alpha / max(self._divisor(outcome), _LEAST_CONFIDENCE) ** wrong_share
        return replace(self, alpha=float(np.clip(alpha, *_ALPHA_RANGE)))

    def _divisor(self, outcome: Outcome) -> float:
        if self.reading == "power":
            return outcome.confidence
        wrong = list(outcome.best_branch[outcome.num_correct :])
        return float(np.exp(outcome.tree.cumulative[wrong]).mean())


@dataclass(frozen=True, slots=True)
class FixedDepth(_SubmitsAll):
    """Plain speculative decoding: verify at a fixed depth."""

    depth: int = 4

    def should_verify(self, growth: Growth, costs: Costs) -> bool:
        return growth.exhausted or growth.depth >= self.depth


@dataclass(frozen=True, slots=True)
class FixedTree(_SubmitsAll):
    """SpecInfer: verify when the tree has its fixed shape (`FixedExpansion` with the same widths grows it)."""

    widths: tuple[int, ...] = SPECINFER_WIDTHS

    def should_verify(self, growth: Growth, costs: Costs) -> bool:
        return growth.exhausted


@dataclass(frozen=True, slots=True)
class TokenConfidence(_SubmitsAll):
    """Big Little Decoder's fallback: verify when the draft is unsure of its newest token, or deep enough."""

    threshold: float = 0.4
    max_depth: int = 16

    def should_verify(self, growth: Growth, costs: Costs) -> bool:
        return growth.exhausted or growth.last_confidence < self.threshold or growth.depth >= self.max_depth


@dataclass(frozen=True, slots=True)
class MarginalThroughput:
    """Ours: draft on while the next step raises the tokens per second expected of the round.

    A pass over the n best nodes of r requests' trees yields A = r + p_1 + ... + p_n tokens (a bonus for each request,
    and each node with its calibrated probability) in a round of R seconds (`Costs.round_seconds`: drafting so far, and
    the pass). One step more is expected to yield A + g in R + c seconds, where c is what of the step is not hidden
    behind reading, plus the computing of the nodes it adds. It pays when

        (A + g) / (R + c) > A / R,   that is   g / c > A / R :

    when it buys tokens at a better rate than the round has. Steps gain less and less (the best candidates go
    first), so the first step that does not pay ends the drafting: the ratio is unimodal. A step that is hidden
    altogether (c = 0) pays as long as it gains anything at all. Nodes carry at most `best_frontier` each, so a
    gain of g takes at least g / best_frontier of them. A pass with one node runs some more rows anyway: the nodes that
    fill these are free.

    What a prompt costs its first pass is spent anyway. There A / R is the rate of a round without it.

    Where the draft goes on during the pass, it begins with the nodes that the step would have run, and the next tree
    has them for nothing. So a part of g comes anyway, one round later, and only the rest counts.

    Whether a round is drafted at all is decided by what drafted rounds and plain passes have brought (`Worth`).
    """

    calibration: Calibration = field(default_factory=Calibration)
    worth: Worth = field(default_factory=Worth)

    def should_draft(self, costs: Costs, unseen: int, left: int) -> bool:
        return self.worth.should_draft(costs, unseen, left)

    def should_end_draft(self, costs: Costs) -> bool:
        return self.worth.is_useless(costs)

    def should_verify(self, growth: Growth, costs: Costs) -> bool:
        if growth.exhausted:
            return True
        probabilities = self.calibration.apply(growth.cumulative)
        count = _best_count(probabilities, costs) or min(1, len(probabilities))
        tokens = costs.num_requests + float(probabilities[:count].sum())
        rate = tokens / costs.without_prompt().round_seconds(count)
        nodes = count + growth.next_gain / max(growth.best_frontier, _LEAST_CONFIDENCE)
        longer = costs.round_seconds(nodes, costs.draft_step_s) - costs.round_seconds(count)
        share = _OWN_SHARE if is_worth_it(costs, count) else 1.0
        return bool(share * self._gain(growth) <= rate * longer)

    def choose_nodes(self, cumulative: np.ndarray, costs: Costs) -> int:
        """One node at least, but none where the tree is next to worthless."""
        probabilities = self.calibration.apply(cumulative)
        count = _best_count(probabilities, costs) or min(1, len(cumulative))
        hoped = costs.num_requests + _HOPE * float(probabilities[:count].sum())
        without = costs.num_requests * float(costs.round_seconds(count))
        is_worthless = hoped * costs.seconds_without_nodes() < without
        return 0 if is_worthless else count

    def after_round(self, done: Round) -> Self:
        return replace(self, worth=self.worth.after(done))

    def after(self, outcome: Outcome) -> Self:
        if not len(outcome.tree):
            return self
        accepted = np.zeros(len(outcome.tree), np.bool_)
        accepted[list(outcome.path)] = True
        return replace(self, calibration=self.calibration.observe(np.exp(outcome.tree.cumulative), accepted))

    def _gain(self, growth: Growth) -> float:
        """The draft's estimate, corrected as the probability of the best frontier node is."""
        corrected = float(self.calibration.apply(np.array([growth.best_frontier]))[0])
        return growth.next_gain * corrected / max(growth.best_frontier, _LEAST_CONFIDENCE)


def _best_count(probabilities: np.ndarray, costs: Costs) -> int:
    """n that maximises (r + p_1 + ... + p_n) / round(n), for r requests: CaDDTree's rule.

    Written as the n that gains most at the best rate, which is the same, and holds for a prompt's pass too.
    """
    tokens = costs.num_requests + np.concatenate([[0.0], np.cumsum(probabilities)])
    nodes = np.arange(len(tokens))
    best_rate = (tokens / costs.without_prompt().round_seconds(nodes)).max()
    return int(np.argmax(tokens - best_rate * costs.round_seconds(nodes)))
