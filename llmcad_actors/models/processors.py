"""The target's choice where it is not the plain arg max: transformers' own logits processors, along a path of the tree.

They come from the model's generation config (`generation_rules.py` says which) and from the request (`Choosing`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import (
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    LogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llmcad_actors.core.choosing import Choosing, Noise, TokenLogprobs
from llmcad_actors.core.tree import ROOT, TokenTree
from llmcad_actors.errors import CheckpointError
from llmcad_actors.models.sound import is_sound


class PathChoices:
    """What `walk` asks for: the choice after the root (0) and after node i (i + 1), made when it is asked for.

    So the processors run for the accepted path only, not for every node.
    """

    def __init__(
        self,
        logits: torch.Tensor,
        processors: LogitsProcessorList,
        committed: Sequence[int],
        tree: TokenTree,
        noise: Noise | None = None,
    ) -> None:
        """logits: [nodes + 1, vocab] in the computing type; committed: prompt and output, the root last.

        noise: of a sampled request.
        """
        self._logits = logits
        self._processors = processors
        self._noise = noise
        self._committed = committed
        self._tree = tree

    def __getitem__(self, row: int, /) -> int:
        path = self._tree.path(ROOT + row)
        ids = torch.tensor([[*self._committed, *self._tree.tokens[list(path)].tolist()]])
        scores = self._logits[row : row + 1].to(torch.float32, copy=True)
        scores = self._processors(ids, scores)
        if self._noise is not None:
            scores = scores.double() + torch.from_numpy(self._noise.row(ids.shape[1]))
        highest, token = scores.max(dim=-1)
        if not is_sound(highest).all():
            raise CheckpointError(
                f"no token is left to go on with after {ids.shape[1]} of prompt and text: the settings of "
                "generation_config.json, and the request's own, forbid every one; correct the file, or ask for less"
            )
        return int(token)


class OutputPenalties(LogitsProcessor):  # type: ignore[misc]
    """OpenAI's presence and frequency penalties, for tokens of the output so far."""

    def __init__(self, prompt_length: int, presence: float, frequency: float) -> None:
        self._prompt_length = prompt_length
        self._presence = presence
        self._frequency = frequency

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        tokens, counts = torch.unique(input_ids[0, self._prompt_length :], return_counts=True)
        scores = scores.clone()
        scores[0, tokens] -= self._presence + self._frequency * counts
        return scores


def logprobs_of(logits: torch.Tensor, tokens: Sequence[int], count: int) -> tuple[TokenLogprobs, ...]:
    """logits: [tokens, vocab]; count: of alternatives to each token, the most probable ones."""
    said = logits.float().log_softmax(dim=-1)
    values, ids = said.topk(min(count, said.shape[1]), dim=-1)
    return tuple(
        TokenLogprobs(token, float(row[token]), tuple(zip(best.tolist(), of_best.tolist(), strict=True)))
        for token, row, best, of_best in zip(tokens, said, ids, values, strict=True)
    )


def make_processors(
    rules: Mapping[str, Any],
    choosing: Choosing,
    *,
    prompt_length: int,
    max_length: int,
    stop_tokens: Sequence[int],
) -> LogitsProcessorList:
    """The processors of the active `rules` and of a request. max_length: tokens of prompt and output."""
    if choosing.repetition_penalty is not None:
        rules = {**rules, "repetition_penalty": choosing.repetition_penalty}
    stops = torch.tensor(list(stop_tokens), dtype=torch.int64)
    begin = prompt_length + (prompt_length == 1 and "forced_bos_token_id" in rules)
    makers: dict[str, Callable[[Any], Any]] = {  # in the order in which `generate` applies them
        "repetition_penalty": RepetitionPenaltyLogitsProcessor,
        "no_repeat_ngram_size": NoRepeatNGramLogitsProcessor,
        "bad_words_ids": lambda words: NoBadWordsLogitsProcessor(words, stops),
        "min_length": lambda length: MinLengthLogitsProcessor(length, stops),
        "min_new_tokens": lambda count: MinNewTokensLengthLogitsProcessor(prompt_length, count, stops),
        "forced_bos_token_id": ForcedBOSTokenLogitsProcessor,
        "forced_eos_token_id": lambda ids: ForcedEOSTokenLogitsProcessor(max_length, ids),
        "suppress_tokens": SuppressTokensLogitsProcessor,
        "begin_suppress_tokens": lambda ids: SuppressTokensAtBeginLogitsProcessor(ids, begin),
    }
    ruled = [make(rules[name]) for name, make in makers.items() if name in rules]
    return LogitsProcessorList([*_changes(choosing, prompt_length), *ruled, *_filters(choosing)])


def _changes(choosing: Choosing, prompt_length: int) -> list[LogitsProcessor]:
    made: list[LogitsProcessor] = []
    if choosing.logit_bias:
        made.append(SequenceBiasLogitsProcessor({(token,): bias for token, bias in choosing.logit_bias}))
    if choosing.presence_penalty or choosing.frequency_penalty:
        made.append(OutputPenalties(prompt_length, choosing.presence_penalty, choosing.frequency_penalty))
    return made


def _filters(choosing: Choosing) -> list[LogitsProcessor]:
    """Of a sampled request, in the order of `generate`."""
    made: list[LogitsProcessor] = []
    if choosing.is_sampled and choosing.temperature != 1:
        made.append(TemperatureLogitsWarper(choosing.temperature))
    if choosing.is_sampled and choosing.top_k:
        made.append(TopKLogitsWarper(choosing.top_k))
    if choosing.is_sampled and choosing.top_p < 1:
        made.append(TopPLogitsWarper(choosing.top_p))
    if choosing.is_sampled and choosing.min_p > 0:
        made.append(MinPLogitsWarper(choosing.min_p))
    return made
