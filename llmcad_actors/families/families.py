"""Architectures as data: what tensors are called, and what shapes the config says they have.

A new family is one more row of `FAMILIES`, and a case in tests/test_families.py. No torch here: config.json and
tensor names decide everything.
"""

from dataclasses import replace

from llmcad_actors.core.quoting import quoted
from llmcad_actors.errors import CheckpointError
from llmcad_actors.families.encoder_decoder_families import ENCODER_DECODER_FAMILIES
from llmcad_actors.families.family import Config, Family, Shapes, need, says

__all__ = ["FAMILIES", "Config", "Family", "Shapes", "family_of", "need"]


def head_dim_of(config: Config, default: int | None = None) -> int:
    """Width of one attention head: stated, else the family's default, else hidden_size / heads."""
    if config.get("head_dim") is not None:
        return need(config, "head_dim")
    return default or need(config, "hidden_size") // need(config, "num_attention_heads")


def _llama_layer(config: Config, *, head_dim: int | None = None) -> Shapes:
    """Leaves of a layer with separate q/k/v/o and a gated FFN, no biases. Weights are [out, in]."""
    hidden, inner, heads = (need(config, k) for k in ("hidden_size", "intermediate_size", "num_attention_heads"))
    kv_heads = heads if config.get("num_key_value_heads") is None else need(config, "num_key_value_heads")
    head_dim = head_dim_of(config, head_dim)
    return {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (heads * head_dim, hidden),
        "self_attn.k_proj.weight": (kv_heads * head_dim, hidden),
        "self_attn.v_proj.weight": (kv_heads * head_dim, hidden),
        "self_attn.o_proj.weight": (hidden, heads * head_dim),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }


def _with_biases(shapes: Shapes, *modules: str) -> Shapes:
    return shapes | {f"{m}.bias": shapes[f"{m}.weight"][:1] for m in modules}


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_ATTENTION = (*_QKV, "self_attn.o_proj")
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def _llama(config: Config) -> Shapes:
    shapes = _llama_layer(config)
    if says(config, "attention_bias"):
        shapes = _with_biases(shapes, *_ATTENTION)
    return _with_biases(shapes, *_MLP) if says(config, "mlp_bias") else shapes


def _qwen2(config: Config) -> Shapes:
    return _with_biases(_llama_layer(config), *_QKV)


def _qwen3(config: Config) -> Shapes:
    shapes = _llama_layer(config, head_dim=128)  # transformers' default, whatever the hidden size
    norms: Shapes = {f"self_attn.{n}_norm.weight": (head_dim_of(config, 128),) for n in "qk"}
    return norms | (_with_biases(shapes, *_ATTENTION) if says(config, "attention_bias") else shapes)


def _falcon_kv_heads(config: Config) -> int:
    """The new architecture (40B) repeats keys for all heads before they are cached; the old one has one head."""
    if says(config, "new_decoder_architecture") or not says(config, "multi_query", default=True):
        return need(config, "num_attention_heads")
    return 1


_LLAMA = Family(
    model_types=("llama",),
    layers="model.layers",
    embedding="model.embed_tokens.weight",
    resident=("model.norm.weight",),
    layer_shapes=_llama,
)
_BIDIRECTIONAL = (("use_bidirectional_attention", False, "tokens see what comes after them"),)
_GEMMA = replace(_LLAMA, is_tied_by_default=True, head_dim_default=256, layer_shapes=None, refused=_BIDIRECTIONAL)
_ALIKE: tuple[tuple[str, object, str], ...] = (
    ("mlp_only_layers", [], "some layers have no experts"),
    ("decoder_sparse_step", 1, "some layers have no experts"),
)
_EXPERTS = replace(
    _LLAMA,
    layer_shapes=None,
    experts={"gate_up_proj": ("gate_proj.weight", "up_proj.weight"), "down_proj": ("down_proj.weight",)},
)
_GPT2 = Family(
    model_types=("gpt2",),
    layers="transformer.h",
    embedding="transformer.wte.weight",
    base="transformer.",
    resident=("transformer.wpe.weight", "transformer.ln_f.weight", "transformer.ln_f.bias"),
    is_tied_by_default=True,
    num_layers_key="n_layer",
    num_heads_key="n_head",
    num_kv_heads_of=lambda config: need(config, "n_head"),
    hidden_keys=("n_embd",),
    context_key="n_positions",
    context_default=1024,
)

FAMILIES = (
    _LLAMA,
    replace(_LLAMA, model_types=("mistral",), sliding_windows="all", layer_shapes=_llama_layer),
    replace(_LLAMA, model_types=("qwen2",), sliding_windows="by_layer_type", layer_shapes=_qwen2),
    replace(_LLAMA, model_types=("qwen3",), sliding_windows="by_layer_type", layer_shapes=_qwen3, head_dim_default=128),
    replace(_LLAMA, model_types=("smollm3",), sliding_windows="by_layer_type", is_tied_by_default=True),
    replace(_LLAMA, model_types=("olmo2",), layer_shapes=None),
    replace(_LLAMA, model_types=("olmo3",), layer_shapes=None, sliding_windows="by_layer_type"),
    replace(_LLAMA, model_types=("phi3",), layer_shapes=None, sliding_windows="all", context_default=4096),
    replace(_LLAMA, model_types=("stablelm",), layer_shapes=None, resident=("model.norm.weight", "model.norm.bias")),
    replace(
        _LLAMA,
        model_types=("phi",),
        layer_shapes=None,
        resident=("model.final_layernorm.weight", "model.final_layernorm.bias"),
    ),
    replace(_GEMMA, model_types=("gemma",)),
    replace(
        _GEMMA,
        model_types=("gemma2",),
        sliding_windows="by_layer_type",
        softcap_key="final_logit_softcapping",
        holds_scores=True,
    ),
    replace(
        _GEMMA, model_types=("gemma3_text",), sliding_windows="by_layer_type", softcap_key="final_logit_softcapping"
    ),
    replace(
        _EXPERTS,
        model_types=("mixtral",),
        sliding_windows="all",
        experts={"gate_up_proj": ("w1.weight", "w3.weight"), "down_proj": ("w2.weight",)},
        block=("block_sparse_moe.", "mlp."),
    ),
    replace(_EXPERTS, model_types=("qwen2_moe",), sliding_windows="by_layer_type", refused=_ALIKE),
    replace(_EXPERTS, model_types=("qwen3_moe",), sliding_windows="all", refused=_ALIKE),
    _GPT2,
    replace(
        _GPT2,
        model_types=("gptj",),
        resident=("transformer.ln_f.weight", "transformer.ln_f.bias"),
        is_tied_by_default=False,
        context_default=2048,
        holds_scores=True,
    ),
    Family(
        model_types=("falcon",),
        layers="transformer.h",
        embedding="transformer.word_embeddings.weight",
        base="transformer.",
        resident=("transformer.ln_f.weight", "transformer.ln_f.bias"),
        is_tied_by_default=True,
        num_kv_heads_of=_falcon_kv_heads,
        refused=(
            ("alibi", False, "attention biases by distance (ALiBi), which transformers cannot give to a token tree"),
        ),
    ),
    Family(
        model_types=("opt",),
        layers="model.decoder.layers",
        embedding="model.decoder.embed_tokens.weight",
        resident=("model.decoder.embed_positions.weight",),
        is_tied_by_default=True,
        hidden_keys=("word_embed_proj_dim", "hidden_size"),
    ),
    Family(
        model_types=("gpt_neox",),
        layers="gpt_neox.layers",
        embedding="gpt_neox.embed_in.weight",
        head_aliases=("embed_out.weight",),
        base="gpt_neox.",
        resident=("gpt_neox.final_layer_norm.weight", "gpt_neox.final_layer_norm.bias"),
    ),
    *ENCODER_DECODER_FAMILIES,
)


def family_of(config: Config) -> Family:
    """The row for config.json's model_type.

    Raises CheckpointError: an unknown architecture (naming the known ones), or one whose setting is not supported.
    """
    model_type = config.get("model_type")
    for family in FAMILIES:
        if model_type in family.model_types:
            _check_settings(family, config)
            return family
    known = ", ".join(sorted(t for f in FAMILIES for t in f.model_types))
    said = "has no model_type" if model_type is None else f"says model_type {quoted(model_type)}"
    why = "which llmcad does not know"
    if config.get("vision_config") is not None:
        why = "a model of pictures and text, and llmcad runs text alone"
    raise CheckpointError(f"config.json {said}, {why}; known architectures: {known}.")


def _check_settings(family: Family, config: Config) -> None:
    for key, ordinary, meaning in family.refused:
        if config.get(key) not in (None, ordinary):
            raise CheckpointError(
                f"config.json sets {key}: {meaning}; llmcad does not run such a {config['model_type']} model, "
                "use another one."
            )
