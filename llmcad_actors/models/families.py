"""Architectures as data: what tensors are called, and what shapes the config says they have.

A new family is one more row of `FAMILIES`. No torch here: config.json and tensor names decide everything.
Names are those of transformers' ForCausalLM parameters; a file may store the same tensors under another
prefix (GPT-2 with and without "transformer.") or, for the head, another name (GPT-NeoX's "embed_out.weight").
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from llmcad_actors.errors import CheckpointError

Config = Mapping[str, Any]
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One architecture's names. Sizes are read through the config keys named here."""

    model_types: tuple[str, ...]  # config.json's "model_type"
    layers: str  # prefix of the decoder layers: "model.layers"
    embedding: str  # "model.embed_tokens.weight"
    head: str = "lm_head.weight"  # absent from the file when tied: the embedding is the head
    head_aliases: tuple[str, ...] = ()  # other names files store the head under
    base: str = "model."  # leading part of the names above that some files replace ...
    base_aliases: tuple[str, ...] = ("",)  # ... by one of these
    resident: tuple[str, ...] = ()  # parameters outside layers, embedding and head that must be there
    is_tied_by_default: bool = False  # transformers' default when config.json does not say
    num_layers_key: str = "num_hidden_layers"
    hidden_keys: tuple[str, ...] = ("hidden_size",)  # width of embedding and head: the first key present
    layer_shapes: Callable[[Config], Shapes] | None = None  # leaf -> shape; None: all like layer 0

    def num_layers(self, config: Config) -> int:
        return need(config, self.num_layers_key)

    def embedding_shape(self, config: Config) -> tuple[int, int]:
        """[vocab, width]; the head has the same shape."""
        width = next((key for key in self.hidden_keys if config.get(key) is not None), self.hidden_keys[-1])
        return need(config, "vocab_size"), need(config, width)

    def is_tied(self, config: Config) -> bool:
        return bool(config.get("tie_word_embeddings", self.is_tied_by_default))

    def stored_base(self, names: Iterable[str]) -> str:
        """What stands for `base` in a file that holds these tensor names."""
        names = set(names)
        tail = self.embedding.removeprefix(self.base)
        return next((b for b in (self.base, *self.base_aliases) if b + tail in names), self.base)


def need(config: Config, key: str) -> int:
    """A positive whole number of config.json, or a CheckpointError that names the key."""
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise CheckpointError(f"config.json: {key} must be a positive whole number, found {value!r}.")
    return value


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
    if config.get("attention_bias"):
        shapes = _with_biases(shapes, *_ATTENTION)
    return _with_biases(shapes, *_MLP) if config.get("mlp_bias") else shapes


def _qwen2(config: Config) -> Shapes:
    return _with_biases(_llama_layer(config), *_QKV)


def _qwen3(config: Config) -> Shapes:
    shapes = _llama_layer(config, head_dim=128)  # transformers' default, whatever the hidden size
    norms: Shapes = {f"self_attn.{n}_norm.weight": (head_dim_of(config, 128),) for n in "qk"}
    return norms | (_with_biases(shapes, *_ATTENTION) if config.get("attention_bias") else shapes)


def _llama_like(model_type: str, layer_shapes: Callable[[Config], Shapes]) -> Family:
    return Family(
        model_types=(model_type,),
        layers="model.layers",
        embedding="model.embed_tokens.weight",
        resident=("model.norm.weight",),
        layer_shapes=layer_shapes,
    )


FAMILIES = (
    _llama_like("llama", _llama),
    _llama_like("mistral", _llama_layer),
    _llama_like("qwen2", _qwen2),
    _llama_like("qwen3", _qwen3),
    Family(
        model_types=("gpt2",),
        layers="transformer.h",
        embedding="transformer.wte.weight",
        base="transformer.",
        resident=("transformer.wpe.weight", "transformer.ln_f.weight", "transformer.ln_f.bias"),
        is_tied_by_default=True,
        num_layers_key="n_layer",
        hidden_keys=("n_embd",),
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
)


def family_of(config: Config) -> Family:
    """The row for config.json's model_type. Raises CheckpointError naming the known architectures."""
    model_type = config.get("model_type")
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(sorted(t for f in FAMILIES for t in f.model_types))
    said = "has no model_type" if model_type is None else f"says model_type {model_type!r}"
    raise CheckpointError(f"config.json {said}, which llmcad does not know; known architectures: {known}.")
