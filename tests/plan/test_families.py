"""Plans for real-size models of every family, made from their headers alone."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from llmcad_actors.cli.commands import app
from llmcad_actors.core.tree import TokenTree
from llmcad_actors.families.families import FAMILIES, family_of
from llmcad_actors.plan.footprint import kv_bytes
from llmcad_actors.storage.checkpoint import Checkpoint
from tests.encoder_decoder_cases import CASES as ENCODER_DECODER
from tests.family_cases import CASES
from tests.models.checkpoints import CAPACITY, target_of
from tests.sparse import sparse_checkpoint


@dataclass(frozen=True)
class Real:
    """A published model: its config.json's sizes, its number of parameters, bytes that a token takes in the cache."""

    model_type: str
    billions: float
    cached: int  # bytes a token in bfloat16: 2 * layers * heads in the cache * width of a head * 2
    context: int
    fields: dict[str, Any]
    encoded: int = 0  # bytes a token of the prompt: the encoder's states, and keys and values of them
    has_head: bool = False  # in the file, though transformers would tie it
    planned: int = 2048  # the longest context to plan for


def sizes(hidden: int, inner: int, layers: int, heads: int, kv: int, vocab: int, **more: object) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocab,
        **more,
    }


def t5(width: int, head: int, inner: int, heads: int, vocab: int, **more: object) -> dict[str, Any]:
    """24 layers in each half."""
    layers = {"num_layers": 24, "num_decoder_layers": 24, "num_heads": heads, "vocab_size": vocab}
    layers["decoder_start_token_id"] = 0
    return {"d_model": width, "d_kv": head, "d_ff": inner, **layers, **more}


def bart(width: int, layers: int, heads: int, vocab: int, context: int = 1024, **more: object) -> dict[str, Any]:
    halves = {
        f"{half}_{key}": value
        for half in ("encoder", "decoder")
        for key, value in {"layers": layers, "attention_heads": heads, "ffn_dim": 4 * width}.items()
    }
    start = {"decoder_start_token_id": 2}
    return {"d_model": width, "vocab_size": vocab, "max_position_embeddings": context, **halves, **start, **more}


GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LONGROPE = {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
REAL: dict[str, Real] = {
    "Llama-2-13B": Real(
        "llama", 13.016, 2 * 40 * 5120 * 2, 4096, sizes(5120, 13824, 40, 40, 40, 32000, max_position_embeddings=4096)
    ),
    "Llama-3.1-8B": Real(
        "llama",
        8.030,
        2 * 32 * 1024 * 2,
        131072,
        sizes(4096, 14336, 32, 32, 8, 128256, max_position_embeddings=131072, rope_scaling=LLAMA3, rope_theta=500000.0),
    ),
    "Mistral-7B": Real(
        "mistral",
        7.242,
        2 * 32 * 1024 * 2,
        32768,
        sizes(4096, 14336, 32, 32, 8, 32000, max_position_embeddings=32768, sliding_window=4096),
    ),
    "Qwen2.5-7B": Real(
        "qwen2",
        7.616,
        2 * 28 * 512 * 2,
        32768,
        sizes(3584, 18944, 28, 28, 4, 152064, max_position_embeddings=32768, use_sliding_window=False),
    ),
    "Qwen3-8B": Real(
        "qwen3",
        8.191,
        2 * 36 * 1024 * 2,
        40960,
        sizes(4096, 12288, 36, 32, 8, 151936, max_position_embeddings=40960, head_dim=128),
    ),
    "SmolLM3-3B": Real(
        "smollm3", 3.075, 2 * 36 * 512 * 2, 65536, sizes(2048, 11008, 36, 16, 4, 128256, max_position_embeddings=65536)
    ),
    "OLMo-2-7B": Real(
        "olmo2", 7.299, 2 * 32 * 4096 * 2, 4096, sizes(4096, 11008, 32, 32, 32, 100352, max_position_embeddings=4096)
    ),
    "OLMo-3-7B": Real(
        "olmo3", 7.298, 2 * 32 * 4096 * 2, 65536, sizes(4096, 11008, 32, 32, 32, 100278, max_position_embeddings=65536)
    ),
    "Phi-2": Real(
        "phi", 2.780, 2 * 32 * 2560 * 2, 2048, sizes(2560, 10240, 32, 32, 32, 51200, max_position_embeddings=2048)
    ),
    "Phi-3-mini-4k": Real(
        "phi3",
        3.821,
        2 * 32 * 3072 * 2,
        4096,
        sizes(3072, 8192, 32, 32, 32, 32064, max_position_embeddings=4096, sliding_window=2047),
    ),
    "Phi-3-mini-128k": Real(
        "phi3",
        3.821,
        2 * 32 * 3072 * 2,
        4096,  # longrope: as far as its first length
        sizes(
            3072,
            8192,
            32,
            32,
            32,
            32064,
            max_position_embeddings=131072,
            original_max_position_embeddings=4096,
            sliding_window=262144,
            rope_scaling=LONGROPE,
        ),
    ),
    "StableLM-2-12B": Real(
        "stablelm",
        12.143,
        2 * 40 * 1280 * 2,
        4096,
        sizes(
            5120,
            13824,
            40,
            32,
            8,
            100352,
            max_position_embeddings=4096,
            qk_layernorm=True,
            use_parallel_residual=True,
        ),
    ),
    "Gemma-7B": Real(
        "gemma", 8.538, 2 * 28 * 4096 * 2, 8192, sizes(3072, 24576, 28, 16, 16, 256000, max_position_embeddings=8192)
    ),
    "Gemma-2-9B": Real(
        "gemma2",
        9.242,
        2 * 42 * 2048 * 2,
        8192,
        sizes(3584, 14336, 42, 16, 8, 256000, max_position_embeddings=8192, sliding_window=4096),
    ),
    "Gemma-3-1B": Real(
        "gemma3_text",
        1.000,
        2 * 26 * 256 * 2,
        32768,
        sizes(1152, 6912, 26, 4, 1, 262144, max_position_embeddings=32768, sliding_window=512),
    ),
    "Mixtral-8x7B": Real(
        "mixtral",
        46.703,
        2 * 32 * 1024 * 2,
        32768,
        sizes(4096, 14336, 32, 32, 8, 32000, max_position_embeddings=32768, num_local_experts=8),
    ),
    "Qwen1.5-MoE-A2.7B": Real(
        "qwen2_moe",
        14.316,
        2 * 24 * 2048 * 2,
        8192,
        sizes(
            2048,
            5632,
            24,
            16,
            16,
            151936,
            max_position_embeddings=8192,
            num_experts=60,
            moe_intermediate_size=1408,
            shared_expert_intermediate_size=5632,
        ),
    ),
    "Qwen3-30B-A3B": Real(
        "qwen3_moe",
        30.532,
        2 * 48 * 512 * 2,
        40960,
        sizes(
            2048,
            6144,
            48,
            32,
            4,
            151936,
            max_position_embeddings=40960,
            head_dim=128,
            num_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=768,
        ),
    ),
    "GPT-2 XL": Real(
        "gpt2",
        1.558,
        2 * 48 * 1600 * 2,
        1024,
        {"n_embd": 1600, "n_layer": 48, "n_head": 25, "vocab_size": 50257, "n_positions": 1024},
    ),
    "GPT-J-6B": Real(
        "gptj",
        6.051,
        2 * 28 * 4096 * 2,
        2048,
        {"n_embd": 4096, "n_layer": 28, "n_head": 16, "vocab_size": 50400, "rotary_dim": 64, "n_positions": 2048},
    ),
    "Falcon-7B": Real(
        "falcon",
        6.922,
        2 * 32 * 64 * 2,
        2048,
        {"hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71, "vocab_size": 65024},
    ),
    "Falcon-40B": Real(
        "falcon",
        41.303,
        2 * 60 * 8192 * 2,
        2048,
        {
            "hidden_size": 8192,
            "num_hidden_layers": 60,
            "num_attention_heads": 128,
            "num_kv_heads": 8,
            "new_decoder_architecture": True,
            "vocab_size": 65024,
        },
    ),
    "OPT-13B": Real(
        "opt",
        12.853,
        2 * 40 * 5120 * 2,
        2048,
        {
            "hidden_size": 5120,
            "num_hidden_layers": 40,
            "num_attention_heads": 40,
            "ffn_dim": 20480,
            "word_embed_proj_dim": 5120,
            "vocab_size": 50272,
            "max_position_embeddings": 2048,
        },
    ),
    "Pythia-12B": Real(
        "gpt_neox",
        11.846,
        2 * 36 * 5120 * 2,
        2048,
        {
            "hidden_size": 5120,
            "num_hidden_layers": 36,
            "num_attention_heads": 40,
            "intermediate_size": 20480,
            "vocab_size": 50688,
            "max_position_embeddings": 2048,
        },
    ),
    "T5-11B": Real(
        "t5", 11.307, 2 * 24 * 16384 * 2, 32768, t5(1024, 128, 65536, 128, 32128), encoded=1024 * 2, planned=1024
    ),
    "FLAN-T5-XXL": Real(
        "t5",
        11.135,
        2 * 24 * 4096 * 2,
        32768,
        t5(4096, 64, 10240, 64, 32128, **GATED),
        encoded=4096 * 2,
        has_head=True,
    ),
    "mT5-XXL": Real(
        "mt5",
        12.921,
        2 * 24 * 4096 * 2,
        32768,
        t5(4096, 64, 10240, 64, 250112, **GATED),
        encoded=4096 * 2,
        has_head=True,
    ),
    "BART-large": Real("bart", 0.4063, 2 * 12 * 1024 * 2, 1024, bart(1024, 12, 16, 50265), encoded=1024 * 2),
    "mBART-50": Real("mbart", 0.6109, 2 * 12 * 1024 * 2, 1024, bart(1024, 12, 16, 250054), encoded=1024 * 2),
    "opus-mt-en-de": Real(
        "marian", 0.07441, 2 * 6 * 512 * 2, 512, bart(512, 6, 8, 58101, 512, pad_token_id=58100), encoded=512 * 2
    ),
    "Pegasus-large": Real("pegasus", 0.5708, 2 * 16 * 1024 * 2, 1024, bart(1024, 16, 16, 96103), encoded=1024 * 2),
}


@pytest.mark.parametrize("name", REAL)
def test_a_real_models_plan_streams_its_layers_within_the_cap(name: str, tmp_path: Path) -> None:
    real = REAL[name]
    path = sparse_checkpoint(tmp_path / "model", real.model_type, real.fields, has_head=real.has_head)
    assert sum(8 * 512 < file.stat().st_blocks * 512 < 10**7 for file in path.glob("*.safetensors")) == 1  # a hole
    context = min(real.context, real.planned)

    def planned(*options: str) -> dict[str, Any]:
        arguments = ["--target", str(path), "--memory", "12GB", "--max-context", str(context), "--json", *options]
        done = CliRunner().invoke(app, ["plan", *arguments])
        assert done.exit_code == 0, done.output
        plan: dict[str, Any] = json.loads(done.stdout)
        return plan

    plan = planned()
    assert plan["target_bytes"] / 2e9 == pytest.approx(real.billions, rel=1e-3)
    assert plan["total_bytes"] <= plan["memory_cap_bytes"] == 12 * 10**9
    family = family_of({"model_type": real.model_type, **real.fields})
    shards = plan["pinned"] + plan["streamed"]
    for half, count in (("layer.", family.num_layers), ("encoder.", family.num_encoder_layers)):
        assert sum(shard.startswith(half) for shard in shards) == count(real.fields)
    assert family.context(real.fields) == real.context
    kept = context * (real.encoded + real.cached) if real.encoded else 0
    in_bfloat16 = (context + 128 + 1) * real.cached + kept
    assert plan["parts"]["target cache"] == 2 * in_bfloat16
    assert planned("--dtype", "bfloat16")["parts"]["target cache"] == in_bfloat16


@pytest.mark.parametrize("name", CASES)
def test_the_cache_takes_what_the_plan_says(name: str, tmp_path: Path) -> None:
    target, _ = target_of(CASES[name].save(tmp_path))
    target.begin((1, 2, 3), ())
    target.verify(TokenTree.empty())
    taken = sum(layer.keys.nbytes + layer.values.nbytes for layer in target.target._arena.layers)
    assert taken == kv_bytes(Checkpoint.open(tmp_path).config, CAPACITY + 128, 4)


def test_each_family_has_a_real_model_and_a_tiny_one() -> None:
    known = {model_type for family in FAMILIES for model_type in family.model_types}
    tiny = {case.model_type for cases in (CASES, ENCODER_DECODER) for case in cases.values()}
    assert {real.model_type for real in REAL.values()} == tiny == known
