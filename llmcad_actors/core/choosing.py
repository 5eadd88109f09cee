"""How a request's tokens are chosen: the arg max of log p, or of log p + g, with g Gumbel noise (the Gumbel-max trick).

The noise of a token is addressed by (seed, position in the text, token id), so a text depends on its seed alone. The
draft adds the same noise to its own log-probabilities: what it ranks first is then what the target is likely to draw,
and sampling is greedy decoding of perturbed logits (drafter-invariant speculative decoding: Daliri, Musco, Suresh 2024,
arXiv 2408.07978). Trees, sharpening and calibration need not know of it.

The generator is numpy's Philox, which is counter-based (Salmon et al. 2011): seed and position are its key, the token's
id is the place in its stream. numpy keeps the streams of its bit generators the same from version to version.
"""

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

LIKELY = 1024
"""Of a node's tokens, the draft perturbs so many, the most probable ones."""

NOISE_BYTES = 4 << 20
"""That the draft keeps of the noise of all requests: nodes of one depth share theirs, and steps meet it again."""


@dataclass(frozen=True, slots=True)
class Choosing:
    """What a request asks for. The default is the target's arg max."""

    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float | None = None  # None: as generation_config.json says
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # token id, what is added to its logit
    seed: int = 0
    logprobs: int | None = None  # alternatives to each token that are told with it; None: nothing is

    @property
    def is_sampled(self) -> bool:
        return self.temperature > 0

    @property
    def needs_whole_rows(self) -> bool:
        """A choice looks at all logits of a row at once."""
        changes = self.presence_penalty or self.frequency_penalty or self.logit_bias
        penalised = self.repetition_penalty not in (None, 1.0)
        return bool(self.is_sampled or changes or penalised or self.logprobs is not None)


GREEDY = Choosing()


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """What the target itself, before temperature, filters and penalties, says of an emitted token."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # the most probable tokens, descending: id, log-probability


class Noise:
    """The noise of one request."""

    def __init__(self, seed: int, vocab: int) -> None:
        self._seed = seed
        self._vocab = vocab

    def row(self, position: int) -> np.ndarray:
        """float64[vocab]: of each token, for the choice of the text's token `position`."""
        return _gumbel(_words(self._seed, position, self._vocab))

    def of(self, positions: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """float64, like `tokens` [n, k]: their noise, at each row's position [n]."""
        places = zip(positions.tolist(), tokens, strict=True)
        return _gumbel(np.stack([_kept_words(self._seed, at, self._vocab)[row] for at, row in places]))


def _words(seed: int, position: int, vocab: int) -> np.ndarray:
    """uint64[vocab]."""
    return np.random.Philox(key=np.array([seed, position], np.uint64)).random_raw(vocab)


_newest: OrderedDict[tuple[int, int, int], np.ndarray] = OrderedDict()


def _kept_words(seed: int, position: int, vocab: int) -> np.ndarray:
    """`_words`; the newest ones are kept, as far as `NOISE_BYTES` hold them."""
    key = seed, position, vocab
    words = _newest.pop(key, None)
    if words is None:
        words = _words(*key)
    while _newest and sum(each.nbytes for each in _newest.values()) + words.nbytes > NOISE_BYTES:
        _newest.popitem(last=False)
    _newest[key] = words
    return words


def perturbed(
    tokens: np.ndarray, logits: np.ndarray, positions: np.ndarray, choosing: Choosing, noise: Noise, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """The draft's candidates of a sampled request: tokens and log-probabilities [n, count], descending.

    tokens, logits: [n, k], the most probable ones, descending. positions [n]: of the token that is chosen. The
    probabilities are of being the arg max: a softmax over the perturbed logits of these k.
    """
    scores = np.asarray(logits, np.float64) / choosing.temperature
    scores = np.where(_kept(scores, choosing), scores + noise.of(positions, tokens), -np.inf)
    order = np.argsort(-scores, axis=-1, kind="stable")[:, :count]
    best = np.take_along_axis(scores, order, axis=-1)
    total = np.logaddexp.reduce(scores, axis=-1, keepdims=True)
    return np.take_along_axis(tokens, order, axis=-1), (best - total).astype(np.float32)


def _kept(scores: np.ndarray, choosing: Choosing) -> np.ndarray:
    """bool[n, k]: what the filters leave of scores that descend. The first is always left."""
    kept = np.ones(scores.shape, np.bool_)
    if choosing.top_k:
        kept[:, choosing.top_k :] = False
    if choosing.top_p < 1 or choosing.min_p > 0:
        chances = np.exp(scores - scores[:, :1])
        kept &= chances >= choosing.min_p
        chances /= chances.sum(axis=-1, keepdims=True)
        kept &= np.cumsum(chances, axis=-1) - chances < choosing.top_p
    kept[:, 0] = True
    return kept


def _gumbel(words: np.ndarray) -> np.ndarray:
    """Standard Gumbel numbers of 64-bit words: uniform ones of 53 bits, 0 and 1 excluded, through the inverse."""
    uniform = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return np.asarray(-np.log(-np.log(uniform)))
