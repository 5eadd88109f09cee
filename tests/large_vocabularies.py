"""Tokenizers with large vocabularies, made rather than trained: in a second."""

import itertools
import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def large_bpe(entries: int) -> Tokenizer:
    """Bytes, pairs of letters and pairs of pairs, each the merge of two that are there."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = ["".join(pair) for pair in itertools.product(LETTERS, repeat=2)]
    merges = [(pair[0], pair[1]) for pair in pairs]
    merges += itertools.islice(itertools.product(pairs, pairs), entries - len(alphabet) - len(pairs))
    vocab = {token: i for i, token in enumerate([*alphabet, *("".join(merge) for merge in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def large_unigram(entries: int) -> Tokenizer:
    """Words of one to four letters, the longer the less probable."""
    lengths = (itertools.product(LETTERS, repeat=length) for length in (1, 2, 3, 4))
    words = itertools.islice(itertools.chain.from_iterable(lengths), entries - 1)
    vocab = [("<unk>", 0.0), *(("".join(word), -float(len(word))) for word in words)]
    tokenizer = Tokenizer(models.Unigram(vocab, 0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def with_tokenizer(folder: Path, tokenizer: Tokenizer, *, pretty: bool = True) -> Path:
    """A directory whose tokenizer.json says all."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=pretty)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder
