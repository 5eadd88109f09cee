"""The target's choice under its generation config: transformers' own logits processors, along a path of the tree.

Which settings those are, and what is not supported, is in `generation_rules.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import (
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from llmcad_actors.core.tree import ROOT, TokenTree
from llmcad_actors.errors import CheckpointError
from llmcad_actors.models.sound import is_sound


class PathChoices:
    """What `walk` asks for: the choice after the root (0) and after node i (i + 1), made when it is asked for.

    So the processors run for the accepted path only, not for every node.
    """

    def __init__(
        self, logits: torch.Tensor, processors: LogitsProcessorList, committed: Sequence[int], tree: TokenTree
    ) -> None:
        """logits: [nodes + 1, vocab] in the computing type; committed: prompt and output, the root last."""
        self._logits = logits
        self._processors = processors
        self._committed = committed
        self._tree = tree

    def __getitem__(self, row: int, /) -> int:
        path = self._tree.path(ROOT + row)
        ids = torch.tensor([[*self._committed, *self._tree.tokens[list(path)].tolist()]])
        scores = self._logits[row : row + 1].to(torch.float32, copy=True)
        highest, token = self._processors(ids, scores).max(dim=-1)
        if not is_sound(highest).all():
            raise CheckpointError(
                f"generation_config.json leaves no token to go on with after {ids.shape[1]} of prompt and text: its "
                "settings forbid every one; correct the file, or remove the setting"
            )
        return int(token)


def make_processors(
    rules: Mapping[str, Any], *, prompt_length: int, max_length: int, stop_tokens: Sequence[int]
) -> LogitsProcessorList:
    """The processors of the active `rules` for one request. max_length: tokens of prompt and output."""
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
    return LogitsProcessorList(make(rules[name]) for name, make in makers.items() if name in rules)
