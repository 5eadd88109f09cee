"""Tiny random encoder-decoder checkpoints of every family. To add a family: a line of `CASES`."""

import json
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from tests.tiny import BYTE_VOCAB, byte_tokenizer

torch.set_num_threads(1)  # tiny models: threads would only wait for each other

IDS = {"vocab_size": BYTE_VOCAB, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": 1}
T5 = IDS | {
    "d_model": 48,
    "d_kv": 16,  # not a sixth of the width
    "d_ff": 88,
    "num_layers": 5,  # not fewer than the decoder's: there transformers' own `generate` breaks
    "num_decoder_layers": 4,
    "num_heads": 6,
    "relative_attention_num_buckets": 12,
    "relative_attention_max_distance": 24,
    "decoder_start_token_id": 1,
}
BART = IDS | {
    "d_model": 48,
    "encoder_layers": 5,
    "decoder_layers": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 6,
    "encoder_ffn_dim": 88,
    "decoder_ffn_dim": 104,
    "max_position_embeddings": 128,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
SCALED = BART | {"scale_embedding": True}


@dataclass(frozen=True)
class Case:
    """A model type and its config's fields; what stands in generation_config.json; a head of its own."""

    model_type: str
    fields: dict[str, Any]
    generation: dict[str, Any] = field(default_factory=dict)
    has_head: bool = False
    embedding: float = 0.05  # spread of the embedding; what is not repetitive differs from family to family
    spread: float = 0.3  # of the other matrices

    def unruled(self) -> "Case":
        """The same model with nothing to say but the arg max."""
        return replace(self, fields=self.fields | {"forced_eos_token_id": None}, generation={})

    def save(self, path: Path, *, seed: int = 0, noise: float = 0.0, dtype: torch.dtype = torch.float32) -> Path:
        """A checkpoint of random weights; `noise`, relative to them, goes on top."""
        torch.manual_seed(seed)
        config = AutoConfig.for_model(self.model_type, **self.fields)
        model = AutoModelForSeq2SeqLM.from_config(config, dtype=torch.float32)
        if self.has_head:
            model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.3)
        bias = [model.final_logits_bias] if hasattr(model, "final_logits_bias") else []
        embedding = model.get_input_embeddings().weight
        for relative in (1.0, noise):
            for tensor in (*model.parameters(), *bias):
                spread = self.spread if tensor.ndim > 1 else 0.1
                spread = self.embedding if tensor is embedding else 0.05 if bias and tensor is bias[0] else spread
                tensor.data.add_(torch.randn_like(tensor) * spread * relative)
        for name, value in self.generation.items():
            setattr(model.generation_config, name, value)
        model.to(dtype).save_pretrained(path, max_shard_size="100KB")
        byte_tokenizer().save_pretrained(path)
        if self.has_head:  # as such models were published
            written = json.loads((path / "config.json").read_text())
            del written["scale_decoder_outputs"]
            (path / "config.json").write_text(json.dumps(written | {"tie_word_embeddings": False}))
        return path


GATED = {"feed_forward_proj": "gated-gelu"}
CASES: dict[str, Case] = {
    "t5": Case("t5", T5),
    "t5, version 1.1": Case("t5", T5 | GATED | {"tie_word_embeddings": False}, has_head=True, spread=0.1),
    "mt5": Case("mt5", T5 | GATED, {"repetition_penalty": 1.2}, spread=0.1),
    "bart": Case("bart", BART | {"forced_eos_token_id": 9}, embedding=0.15, spread=0.12),
    "bart, forced first token": Case("bart", SCALED, {"forced_bos_token_id": 7, "no_repeat_ngram_size": 3}),
    "mbart": Case("mbart", SCALED, {"forced_bos_token_id": 5}),
    "marian": Case(
        "marian",
        SCALED | {"activation_function": "swish"},
        {"bad_words_ids": [[1]], "repetition_penalty": 1.3},
        embedding=0.15,
        spread=0.2,
    ),
    "pegasus": Case("pegasus", SCALED | {"activation_function": "relu"}, {"repetition_penalty": 1.3}),
}
ONE_EACH = list({case.model_type: name for name, case in CASES.items()}.values())


class PlainPair:
    """An encoder-decoder checkpoint in float32, as transformers runs it: what every output is compared with."""

    def __init__(self, path: Path) -> None:
        self.model: Any = AutoModelForSeq2SeqLM.from_pretrained(path, dtype=torch.float32).eval()
        self.start = int(self.model.generation_config.decoder_start_token_id)
        self.logprobs = cache(self._logprobs)

    @torch.inference_mode()
    def greedy(self, prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
        """`generate(do_sample=False)`: the new tokens."""
        ids = torch.tensor([prompt])
        out = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, num_beams=1, max_new_tokens=count
        )
        return tuple(out[0, 1:].tolist())

    def in_float64(self, prompt: tuple[int, ...], output: tuple[int, ...]) -> np.ndarray:
        """`logprobs` without float32's roundings."""
        self.model.double()
        try:
            return self._logprobs(prompt, output)
        finally:
            self.model.float()

    @torch.inference_mode()
    def _logprobs(self, prompt: tuple[int, ...], output: tuple[int, ...]) -> np.ndarray:
        """Of the token after `output`."""
        logits = self.model(torch.tensor([prompt]), decoder_input_ids=torch.tensor([[self.start, *output]])).logits
        return np.asarray(logits[0, -1].log_softmax(-1).numpy())


@cache
def plain_pair(path: Path) -> PlainPair:
    return PlainPair(path)
