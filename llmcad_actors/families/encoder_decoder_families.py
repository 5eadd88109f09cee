"""Encoder-decoder architectures as data, as `families.py` has the decoder-only ones."""

from dataclasses import replace

from llmcad_actors.families.family import Config, Encoder, Family, need


def _t5_heads(config: Config) -> int:
    return need(config, "num_heads")


def _bart_heads(config: Config) -> int:
    return need(config, "decoder_attention_heads")


def _norms(*modules: str) -> tuple[str, ...]:
    """Weight and bias of layer norms in both halves."""
    return tuple(
        f"model.{half}.{module}.{leaf}"
        for half in ("encoder", "decoder")
        for module in modules
        for leaf in ("weight", "bias")
    )


_POSITIONS = ("model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight")
_WHOLE = (("is_encoder_decoder", True, "a decoder without its encoder"),)
_T5 = Family(
    model_types=("t5",),
    layers="decoder.block",
    encoder=Encoder(layers="encoder.block", num_layers_key="num_layers"),
    embedding="shared.weight",
    embedding_copies=("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
    unused=("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",),
    base="",
    base_aliases=(),
    resident=("encoder.final_layer_norm.weight", "decoder.final_layer_norm.weight"),
    first_layer_only=("layer.0.SelfAttention.relative_attention_bias.weight",),
    converted=("DenseReluDense.wo.weight",),  # the model brings the rows to this weight's type
    is_always_tied=True,
    num_layers_key="num_decoder_layers",
    num_heads_key="num_heads",
    num_kv_heads_of=_t5_heads,
    head_dim_key="d_kv",
    head_dim_default=64,
    hidden_keys=("d_model",),
    context_default=32768,  # positions are relative: no text is too long
    holds_scores=True,
    refused=_WHOLE,
)
_BART = Family(
    model_types=("bart",),
    layers="model.decoder.layers",
    encoder=Encoder(layers="model.encoder.layers", num_layers_key="encoder_layers"),
    embedding="model.shared.weight",
    embedding_copies=("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"),
    unused=("model.encoder.version", "model.decoder.version"),
    head_bias="final_logits_bias",
    resident=(*_POSITIONS, *_norms("layernorm_embedding")),
    is_tied_by_default=True,
    num_layers_key="decoder_layers",
    num_heads_key="decoder_attention_heads",
    num_kv_heads_of=_bart_heads,
    hidden_keys=("d_model",),
    context_default=1024,
    refused=_WHOLE,
)
_OWN_EMBEDDINGS = ("share_encoder_decoder_embeddings", True, "encoder and decoder have embeddings of their own")

ENCODER_DECODER_FAMILIES = (
    _T5,
    replace(_T5, model_types=("mt5",)),
    _BART,
    replace(_BART, model_types=("mbart",), resident=(*_POSITIONS, *_norms("layernorm_embedding", "layer_norm"))),
    replace(_BART, model_types=("marian",), resident=(), refused=(*_WHOLE, _OWN_EMBEDDINGS)),
    replace(_BART, model_types=("pegasus",), resident=_norms("layer_norm")),
)
