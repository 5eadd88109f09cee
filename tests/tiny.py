"""Tiny random checkpoints on disk, with a tokenizer, built from config classes."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PROMPTS = ("def area(r):\n", "class Stack:\n    def push", "import os, sys\n\nfor name in")
BYTE_VOCAB = 257


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens (ids 1 to 256), <|end|> as 0."""
    vocab = {"<|end|>": 0, **{char: i + 1 for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|end|>")


def tiny_llama(
    path: Path,
    *,
    seed: int = 0,
    layers: int = 4,
    hidden: int = 48,
    kv_heads: int = 2,
    vocab: int = BYTE_VOCAB,
    context: int = 512,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    spread: float = 0.3,
    max_file: str = "50GB",
    tokenizer_of: Path | None = None,
) -> Path:
    """A random Llama of odd sizes; with 2 of 6 heads for keys and values they are grouped.

    spread: std of the weights; larger is less repetitive. tokenizer_of: the tokenizer of that directory, not bytes.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=hidden * 2 + 8,
        num_hidden_layers=layers,
        num_attention_heads=6,
        num_key_value_heads=kv_heads,
        head_dim=8,
        max_position_embeddings=context,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=spread,
    )
    model = LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(path, max_shard_size=max_file)
    if tokenizer_of is None:
        byte_tokenizer().save_pretrained(path)
    else:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tokenizer_of / name, path / name)
    return path


def with_template(folder: Path, template: str | None, **config: Any) -> Path:
    """A directory with a byte tokenizer, this chat template, and this in its tokenizer's config."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return folder
