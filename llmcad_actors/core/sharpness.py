"""How much surer the target is than the draft, learnt from the target's choices.

A greedy target takes its best token always, so a draft that is honest about the next token's distribution is too timid
about the target's choice. Temperature scaling (Guo et al. 2017, "On calibration of modern neural networks") corrects it
with one number, here an exponent s: p becomes p^s, scaled to add up to 1. A tree grown with such probabilities goes
deeper where the draft leads clearly, and wider where it does not.

Each of the target's choices where the draft had named candidates is evidence: the log-likelihood of every exponent on a
grid is summed, old evidence fades, and a prior says that the draft is right. The estimate is the posterior mean.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np

_EXPONENTS = np.geomspace(0.5, 4.0, 13)
_FIRST = 1.5  # a greedy target is surer than any draft that is not
_PRIOR = -0.5 * np.log2(_EXPONENTS / _FIRST) ** 2  # log-probability, up to a constant: within a factor of 2 of it
_FADING = 0.99  # of the evidence, per choice
_LEAST = 1e-9


@dataclass(frozen=True, slots=True)
class Sharpness:
    """An immutable estimate."""

    evidence: tuple[float, ...] = ()  # log-likelihood of each exponent
    exponent: float = _FIRST

    def apply(self, logprobs: np.ndarray) -> np.ndarray:
        """Sharpened log-probabilities [k, b] of k nodes' candidates, given in descending order; in the same order."""
        scaled, rest = _powers(logprobs, np.array([self.exponent]))
        return np.asarray((scaled - _total(scaled, rest)[..., None])[0], logprobs.dtype)

    def after(self, logprobs: np.ndarray, chosen: int | None) -> Self:
        """After a choice among candidates with the draft's log-probabilities [b]; None: it was none of them."""
        scaled, rest = _powers(logprobs, _EXPONENTS)
        likelihood = (rest if chosen is None else scaled[:, chosen]) - _total(scaled, rest)
        evidence = _FADING * np.array(self.evidence or np.zeros(len(_EXPONENTS))) + likelihood
        belief = evidence + _PRIOR
        weights = np.exp(belief - belief.max())
        mean = float(np.exp(np.average(np.log(_EXPONENTS), weights=weights)))
        return type(self)(tuple(evidence.tolist()), mean)


def _powers(logprobs: np.ndarray, exponents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log p^s of the candidates [e, ..., b], and of all other tokens together [e, ...], for each of e exponents.

    What the others have is known, but not how it is spread: taken as tokens as likely as the last candidate, the most
    that they can be.
    """
    by_exponent = exponents.reshape(-1, *(1,) * logprobs.ndim)
    said = np.asarray(logprobs, np.float64)
    left = np.log(np.maximum(1.0 - np.exp(said).sum(axis=-1), _LEAST))
    return by_exponent * said, left + (by_exponent[..., 0] - 1.0) * said[..., -1]


def _total(scaled: np.ndarray, rest: np.ndarray) -> np.ndarray:
    return np.asarray(np.logaddexp(np.logaddexp.reduce(scaled, axis=-1), rest))
