"""Tiny random checkpoints of every family, of odd sizes. To add a family: a line of `CASES`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.tiny import BYTE_VOCAB, byte_tokenizer

WINDOW = 16
IDS = {"vocab_size": BYTE_VOCAB, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": None}
HEADS = {"num_hidden_layers": 4, "num_attention_heads": 6, "max_position_embeddings": 256}
PLAIN = IDS | HEADS | {"hidden_size": 48, "intermediate_size": 88}
GROUPED = PLAIN | {"num_key_value_heads": 2}
WIDE = GROUPED | {"head_dim": 16}
GPT2 = IDS | {"n_layer": 4, "n_head": 6, "n_embd": 48, "n_positions": 256}
EXPERTS = GROUPED | {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
FALCON = IDS | HEADS | {"hidden_size": 48}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [4.0, 5.0, 6.0, 7.0]}
MIXED = {"layer_types": ["sliding_attention", "full_attention"] * 2}


@dataclass(frozen=True)
class Case:
    """A model type and its config's fields; `window`: of its sliding layers."""

    model_type: str
    fields: dict[str, Any] = field(default_factory=lambda: GROUPED)
    window: int | None = None

    def save(self, path: Path, *, seed: int = 0, noise: float = 0.0, dtype: torch.dtype = torch.float32) -> Path:
        """A checkpoint of random weights; `noise`, relative to them, goes on top."""
        config = AutoConfig.for_model(self.model_type, **self.fields)
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        embedding = model.get_input_embeddings().weight  # small: a large one makes the model repeat its input
        for relative in (1.0, noise):
            for parameter in model.parameters():
                spread = 0.05 if parameter is embedding else 0.3 if parameter.ndim > 1 else 0.1
                parameter.data.add_(torch.randn_like(parameter) * spread * relative)
        model.to(dtype).save_pretrained(path, max_shard_size="100KB")
        byte_tokenizer().save_pretrained(path)
        return path


def windowed(model_type: str, fields: dict[str, Any], **more: object) -> Case:
    return Case(model_type, fields | {"sliding_window": WINDOW} | more, window=WINDOW)


CASES: dict[str, Case] = {
    "llama": Case("llama"),
    "llama, tied": Case("llama", GROUPED | {"tie_word_embeddings": True}),
    "llama, biases": Case("llama", PLAIN | {"attention_bias": True, "mlp_bias": True}),
    "llama, rope llama3": Case("llama", GROUPED | {"rope_parameters": LLAMA3 | {"rope_theta": 500.0}}),
    "llama, rope linear": Case("llama", GROUPED | {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}),
    "llama, rope yarn": Case("llama", GROUPED | {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}),
    "llama, rope dynamic": Case("llama", GROUPED | {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}),
    "mistral": windowed("mistral", GROUPED),
    "mistral, no window": Case("mistral", WIDE | {"sliding_window": None}),
    "qwen2": Case("qwen2"),
    "qwen2, windows": windowed("qwen2", GROUPED, use_sliding_window=True, max_window_layers=1),
    "qwen2, a window not used": Case("qwen2", GROUPED | {"sliding_window": WINDOW, "tie_word_embeddings": True}),
    "qwen3": Case("qwen3", WIDE),
    "qwen3, windows": windowed("qwen3", WIDE, use_sliding_window=True, max_window_layers=2),
    "smollm3": Case("smollm3", GROUPED | {"no_rope_layer_interval": 2}),
    "smollm3, windows": windowed("smollm3", GROUPED, use_sliding_window=True, no_rope_layer_interval=2),
    "olmo2": Case("olmo2", GROUPED),
    "olmo3": windowed("olmo3", GROUPED),
    "phi3": windowed("phi3", GROUPED, pad_token_id=200),
    "phi3, longrope": Case("phi3", GROUPED | {"rope_parameters": LONGROPE, "original_max_position_embeddings": 128}),
    "stablelm": Case("stablelm"),
    "stablelm, parallel": Case(
        "stablelm", GROUPED | {"use_parallel_residual": True, "qk_layernorm": True, "use_qkv_bias": True}
    ),
    "phi": Case("phi", GROUPED),
    "phi, norms": Case("phi", GROUPED | {"qk_layernorm": True}),
    "gemma": Case("gemma", WIDE),
    "gemma2": windowed("gemma2", WIDE, query_pre_attn_scalar=16),
    "gemma2, equal logits": windowed("gemma2", WIDE, final_logit_softcapping=1e-5, tie_word_embeddings=False),
    "gemma3": windowed("gemma3_text", WIDE, **MIXED, query_pre_attn_scalar=16),
    "mixtral": windowed("mixtral", GROUPED, num_local_experts=5),
    "qwen2_moe": Case("qwen2_moe", EXPERTS | {"shared_expert_intermediate_size": 40}),
    "qwen2_moe, windows": windowed(
        "qwen2_moe",
        EXPERTS,
        shared_expert_intermediate_size=40,
        use_sliding_window=True,
        max_window_layers=3,
        tie_word_embeddings=True,
    ),
    "qwen3_moe": windowed("qwen3_moe", EXPERTS, head_dim=16, use_sliding_window=True, norm_topk_prob=True),
    "gpt2": Case("gpt2", GPT2),
    "gpt2, scaled by layer": Case("gpt2", GPT2 | {"scale_attn_by_inverse_layer_idx": True}),
    "gptj": Case("gptj", GPT2 | {"rotary_dim": 4}),
    "falcon": Case("falcon", FALCON),
    "falcon, new architecture": Case("falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon, one after the other": Case(
        "falcon", FALCON | {"parallel_attn": False, "multi_query": False, "bias": True, "tie_word_embeddings": False}
    ),
    "opt": Case("opt", IDS | HEADS | {"hidden_size": 48, "ffn_dim": 88, "word_embed_proj_dim": 48, "pad_token_id": 1}),
    "opt, projected": Case(
        "opt",
        IDS | HEADS | {"hidden_size": 48, "ffn_dim": 88, "word_embed_proj_dim": 24, "do_layer_norm_before": False},
    ),
    "gpt_neox": Case("gpt_neox", PLAIN),
    "gpt_neox, one after the other": Case("gpt_neox", PLAIN | {"use_parallel_residual": False, "rotary_pct": 0.5}),
}
