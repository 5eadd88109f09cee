"""Which shape an enlarged model gets: the source's, the wished-for one, and the rules between them. No files."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from llmcad_actors.errors import CheckpointError, ConfigError
from llmcad_actors.families.families import head_dim_of, need

DEFAULT_HIDDEN = 2048
DEFAULT_KV_HEADS = 8
WIDTH_STEP = 256
FFN_RATIO, FFN_STEP = 2.75, 64


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaShape:
    """The sizes of a Llama-architecture model."""

    vocab: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    tied: bool

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.heads // self.kv_heads

    @property
    def layer_parameters(self) -> int:
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate + 2 * self.hidden

    @property
    def parameters(self) -> int:
        tables = (1 if self.tied else 2) * self.vocab * self.hidden
        return tables + self.layers * self.layer_parameters + self.hidden


def check_enlargeable(config: Mapping[str, Any]) -> None:
    """Raises CheckpointError for what cannot be enlarged exactly."""
    if config.get("model_type") != "llama":
        raise CheckpointError(f"only Llama-architecture models can be enlarged, not {config.get('model_type')!r}.")
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise CheckpointError(f"a model with {key} cannot be enlarged: its extra rows would not stay zero.")


def source_shape(config: Mapping[str, Any], *, tied: bool) -> LlamaShape:
    """The shape that the config of a Llama model states; `tied` is what its checkpoint holds."""
    heads = need(config, "num_attention_heads")
    return LlamaShape(
        vocab=need(config, "vocab_size"),
        hidden=need(config, "hidden_size"),
        intermediate=need(config, "intermediate_size"),
        heads=heads,
        kv_heads=heads if config.get("num_key_value_heads") is None else need(config, "num_key_value_heads"),
        head_dim=head_dim_of(config),
        layers=need(config, "num_hidden_layers"),
        tied=tied,
    )


def choose_shape(
    source: LlamaShape,
    *,
    target_bytes: int,
    item_bytes: int,
    hidden: int | None = None,
    intermediate: int | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    layers: int | None = None,
) -> LlamaShape:
    """The widest usual shape whose total reaches `target_bytes` by adding layers.

    What is given is taken as it is. Raises ConfigError when the source does not fit into it, or into the bytes.
    """
    widths = [hidden] if hidden else _widths(source.hidden)
    rejected = ""
    for width in widths:
        try:
            shape = _at_width(source, width, intermediate, heads, kv_heads)
        except ConfigError as error:
            rejected = str(error)
            continue
        if layers:
            return _with_layers(source, shape, layers)
        if hidden or shape.parameters * item_bytes <= target_bytes:
            return _grown(shape, target_bytes, item_bytes)
        rejected = f"the smallest enlargement has {shape.parameters * item_bytes:,} bytes, {target_bytes:,} asked for"
    raise ConfigError(f"cannot enlarge to that: {rejected}.")


def _widths(source: int) -> list[int]:
    """Widest first: the usual width, then smaller ones down to the source's."""
    smallest = -(-source // WIDTH_STEP) * WIDTH_STEP
    return list(range(max(DEFAULT_HIDDEN, smallest), smallest - 1, -WIDTH_STEP))


def _at_width(
    source: LlamaShape, hidden: int, intermediate: int | None, heads: int | None, kv_heads: int | None
) -> LlamaShape:
    """The shape at one width with the source's layer count. Raises ConfigError when the source does not fit."""
    usual_ffn = round(FFN_RATIO * hidden / FFN_STEP) * FFN_STEP
    heads = heads or _usual_heads(source, hidden)
    shape = LlamaShape(
        vocab=source.vocab,
        hidden=hidden,
        intermediate=intermediate or max(usual_ffn, source.intermediate),
        heads=heads,
        kv_heads=kv_heads or _usual_kv_heads(source, heads),
        head_dim=source.head_dim,
        layers=source.layers,
        tied=source.tied,
    )
    _check_fit(source, shape)
    return shape


def _usual_heads(source: LlamaShape, hidden: int) -> int:
    """hidden / head_dim, or the nearest count that divides hidden and keeps the source's groups whole."""
    most = hidden // source.head_dim
    below, above = range(most, source.heads - 1, -1), range(max(most, source.heads), hidden + 1)
    for heads in chain(below, above):
        if hidden % heads == 0 and _kv_choices(source, heads):
            return heads
    return source.heads


def _usual_kv_heads(source: LlamaShape, heads: int) -> int:
    choices = _kv_choices(source, heads)
    if DEFAULT_KV_HEADS in choices:
        return DEFAULT_KV_HEADS
    return choices[0] if choices else source.kv_heads


def _kv_choices(source: LlamaShape, heads: int) -> list[int]:
    """Counts of key/value heads that hold the source's groups."""
    most = heads // source.group
    return [n for n in range(source.kv_heads, most + 1) if heads % n == 0]


def _check_fit(source: LlamaShape, shape: LlamaShape) -> None:
    for name in ("hidden", "intermediate", "heads", "kv_heads", "layers"):
        found, least = getattr(shape, name), getattr(source, name)
        if found < least:
            raise ConfigError(f"{name} {found} is smaller than the source's {least}")
    if shape.heads % shape.kv_heads or shape.group < source.group:
        raise ConfigError(
            f"{shape.heads} heads with {shape.kv_heads} key/value heads do not hold the source's "
            f"{source.kv_heads} groups of {source.group}"
        )
    if shape.hidden % shape.heads:
        raise ConfigError(f"hidden {shape.hidden} is not a multiple of {shape.heads} heads, as transformers demands")


def _with_layers(source: LlamaShape, shape: LlamaShape, layers: int) -> LlamaShape:
    shape = replace(shape, layers=layers)
    try:
        _check_fit(source, shape)
    except ConfigError as error:
        raise ConfigError(f"cannot enlarge to that: {error}.") from error
    return shape


def _grown(shape: LlamaShape, target_bytes: int, item_bytes: int) -> LlamaShape:
    missing = max(0, target_bytes - shape.parameters * item_bytes)
    return replace(shape, layers=shape.layers + -(-missing // (shape.layer_parameters * item_bytes)))
