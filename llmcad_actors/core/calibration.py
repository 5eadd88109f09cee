"""How often a node is really accepted, given what the draft says. Drafts are over-confident.

A node's cumulative draft probability falls into one of a few bins of log-odds. Each bin counts nodes, predictions
and acceptances; old rounds fade. A prior worth a few nodes says that the draft is right, so a bin departs from
the identity only as far as evidence carries it. Between the bins' means the correction is linear in log-odds.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np

_EDGES = np.array([-6.0, -4.5, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.5])  # log-odds between bins
_MIDDLES = np.array([-7.0, -5.25, -3.75, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.75, 5.5])
_PRIOR_NODES = 8.0  # weight of "the draft is right" per bin; nodes of one tree are not independent samples
_FADING = 0.95  # of the counts, per round
_LEAST, _MOST = 1e-12, 1.0 - 1e-12
_NONE = (0.0,) * len(_MIDDLES)


@dataclass(frozen=True, slots=True)
class Calibration:
    """An immutable fit; the empty one is the identity. Fields are per bin, faded sums."""

    nodes: tuple[float, ...] = _NONE
    predicted: tuple[float, ...] = _NONE
    accepted: tuple[float, ...] = _NONE

    def observe(self, predicted: np.ndarray, accepted: np.ndarray) -> Self:
        """After a verdict: float[n] cumulative draft probabilities, bool[n] whether the target went there."""
        bins = np.digitize(_log_odds(predicted), _EDGES)

        def added(sums: tuple[float, ...], weights: np.ndarray) -> tuple[float, ...]:
            new = np.bincount(bins, weights=weights, minlength=len(_MIDDLES))
            return tuple((_FADING * np.array(sums) + new).tolist())

        return type(self)(
            added(self.nodes, np.ones(len(predicted))),
            added(self.predicted, np.clip(predicted, _LEAST, _MOST)),
            added(self.accepted, accepted.astype(np.float64)),
        )

    def apply(self, probabilities: np.ndarray) -> np.ndarray:
        """Corrected probabilities in (0, 1], in the same order: never decreasing in the draft's."""
        if not any(self.nodes):
            return probabilities
        said, found = self._knots()
        # Above the last knot the draft's odds grow without bound while its accuracy does not: hold the value.
        odds = np.minimum(_log_odds(probabilities), said[-1])
        return np.asarray(1.0 / (1.0 + np.exp(-(odds + np.interp(odds, said, found - said)))))

    def _knots(self) -> tuple[np.ndarray, np.ndarray]:
        """Per bin, log-odds: the mean prediction, and the rate of acceptance, made monotone."""
        prior = _PRIOR_NODES / (1.0 + np.exp(-_MIDDLES))
        weight = np.array(self.nodes) + _PRIOR_NODES
        said = _log_odds((np.array(self.predicted) + prior) / weight)
        found = _never_decreasing((np.array(self.accepted) + prior) / weight, weight)
        return said, _log_odds(found)


def _never_decreasing(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted isotonic regression: neighbours in the wrong order are pooled."""
    pools: list[tuple[float, float, int]] = []  # mean, weight, how many
    for mean, weight in zip(values.tolist(), weights.tolist(), strict=True):
        count = 1
        while pools and pools[-1][0] >= mean:
            left_mean, left_weight, left_count = pools.pop()
            mean = (left_mean * left_weight + mean * weight) / (left_weight + weight)
            weight, count = left_weight + weight, left_count + count
        pools.append((mean, weight, count))
    return np.repeat([mean for mean, _, _ in pools], [count for _, _, count in pools])


def _log_odds(probabilities: np.ndarray) -> np.ndarray:
    bounded = np.clip(probabilities, _LEAST, _MOST)
    return np.asarray(np.log(bounded) - np.log1p(-bounded))
