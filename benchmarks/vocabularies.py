"""Tiny random models with large vocabularies: their tokenizers are real, trained on Python's library and made-up words.

What a large vocabulary takes (the tokenizer, rows of logits, the embedding) is all that such a model is made of.
Kept in llmcad's cache folder; a vocabulary of 256k entries is trained in 10 (BPE) to 40 seconds (Unigram).
"""

import json
import random
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from llmcad_actors.machine.cache import cache_folder

END, UNKNOWN = "<|end|>", "<unk>"
ONSETS = (*"bcdfghjklmnprstvwz", "br", "st", "tr", "ch", "sh", "pl", "gr")
VOWELS = (*"aeiou", "ai", "ou", "ea")
CODAS = ("", "n", "s", "t", "r")
WORDS_A_LINE = 1000
TARGET, DRAFT = {"hidden": 64, "layers": 8}, {"hidden": 32, "layers": 2}


def words(count: int) -> list[str]:
    """So many different words of two to four syllables, always the same."""
    choose, found = random.Random(0), set[str]()
    while len(found) < count:
        syllables = (choose.choice(ONSETS) + choose.choice(VOWELS) for _ in range(choose.randint(2, 4)))
        found.add("".join(syllables) + choose.choice(CODAS))
    return sorted(found)


def corpus(count: int) -> Iterator[str]:
    """The sources of Python's library, then `count` words."""
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        yield file.read_text(errors="replace")
    made = words(count)
    for start in range(0, count, WORDS_A_LINE):
        yield " ".join(made[start : start + WORDS_A_LINE])


def bpe(size: int) -> tuple[Tokenizer, trainers.Trainer]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return tokenizer, trainers.BpeTrainer(
        vocab_size=size, min_frequency=1, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )


def unigram(size: int) -> tuple[Tokenizer, trainers.Trainer]:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer, trainers.UnigramTrainer(
        vocab_size=size,
        special_tokens=[END, UNKNOWN],
        unk_token=UNKNOWN,
        shrinking_factor=0.5,
        n_sub_iterations=1,
        show_progress=False,
    )


def wordpiece(size: int) -> tuple[Tokenizer, trainers.Trainer]:
    tokenizer = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = [END, UNKNOWN]
    return tokenizer, trainers.WordPieceTrainer(
        vocab_size=size, min_frequency=1, special_tokens=special, show_progress=False
    )


KINDS: dict[str, Callable[[int], tuple[Tokenizer, trainers.Trainer]]] = {
    "bpe": bpe,
    "unigram": unigram,
    "wordpiece": wordpiece,
}


def trained(kind: str, size: int) -> Tokenizer:
    """A tokenizer with exactly `size` entries."""
    tokenizer, trainer = KINDS[kind](size)
    tokenizer.train_from_iterator(corpus(2 * size), trainer)
    assert tokenizer.get_vocab_size() == size, f"{tokenizer.get_vocab_size()} entries, not {size}"
    return tokenizer


def pair(kind: str, size: int, folder: Path | None = None) -> tuple[Path, Path]:
    """(target, draft) with that vocabulary; made on first use."""
    folder = (folder or cache_folder() / "vocabularies") / f"{kind}-{size}"
    target, draft = folder / "target", folder / "draft"
    if not (draft / "config.json").is_file():  # written last
        tokenizer = trained(kind, size)
        for path, shape in ((target, TARGET), (draft, DRAFT)):
            path.mkdir(parents=True, exist_ok=True)
            tokenizer.save(str(path / "tokenizer.json"))
            (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
            random_llama(path, size, **shape)
    return target, draft


def random_llama(path: Path, vocab: int, *, hidden: int, layers: int) -> None:
    """Random weights in bfloat16; the head is the embedding, as in most small models with large vocabularies."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
