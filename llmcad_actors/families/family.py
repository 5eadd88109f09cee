"""What one architecture is called and how its config.json is read. Plain data, no torch.

Names are those of transformers' ForCausalLM parameters; a file may store the same tensors under another
prefix (GPT-2 with and without "transformer.") or, for the head, another name (GPT-NeoX's "embed_out.weight").
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from llmcad_actors.core.quoting import quoted
from llmcad_actors.errors import CheckpointError

Config = Mapping[str, Any]
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoder:
    """The half of an encoder-decoder model that reads the prompt, once."""

    layers: str  # prefix of its layers: "encoder.block"
    num_layers_key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One architecture's names. Sizes are read through the config keys named here."""

    model_types: tuple[str, ...]  # config.json's "model_type"
    layers: str  # prefix of the decoder layers: "model.layers"
    embedding: str  # "model.embed_tokens.weight"
    head: str = "lm_head.weight"  # absent from the file when tied: the embedding is the head
    head_aliases: tuple[str, ...] = ()  # other names files store the head under
    head_bias: str | None = None  # what is added to the logits; None: the head's own bias, if there is one
    embedding_copies: tuple[str, ...] = ()  # the embedding under other names; a file may hold any of them
    unused: tuple[str, ...] = ()  # parameters that old files hold and no model has
    encoder: Encoder | None = None  # None: a decoder alone
    first_layer_only: tuple[str, ...] = ()  # leaves that the first layer has beyond the others'
    converted: tuple[str, ...] = ()  # ends of linear layers' names whose weights must be in the computing type
    base: str = "model."  # leading part of the names above that some files replace ...
    base_aliases: tuple[str, ...] = ("",)  # ... by one of these
    resident: tuple[str, ...] = ()  # parameters outside layers, embedding and head that must be there
    is_tied_by_default: bool = False  # transformers' default when config.json does not say
    is_always_tied: bool = False  # whatever config.json says, unless the file holds a head
    num_layers_key: str = "num_hidden_layers"
    num_heads_key: str = "num_attention_heads"
    num_kv_heads_of: Callable[[Config], int] | None = None  # heads in the cache; None: num_key_value_heads
    head_dim_key: str = "head_dim"
    head_dim_default: int | None = None  # None: hidden size / heads
    hidden_keys: tuple[str, ...] = ("hidden_size",)  # width of embedding and head: the first key present
    context_key: str = "max_position_embeddings"
    context_default: int = 2048
    sliding_windows: Literal["none", "all", "by_layer_type"] = "none"  # which layers a sliding window holds for
    softcap_key: str | None = None  # the head's logits are cap * tanh(logits / cap)
    holds_scores: bool = False  # attention scores of all heads stand in memory at once
    refused: tuple[tuple[str, object, str], ...] = ()  # (config key, the value that is run, what others mean)
    experts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # joined parameter -> an expert's tensors
    block: tuple[str, str] | None = None  # what the file calls the experts' module, and what the model does
    layer_shapes: Callable[[Config], Shapes] | None = None  # leaf -> shape; None: all like layer 0

    @property
    def layer_lists(self) -> tuple[str, ...]:
        """Prefixes of the layers, the encoder's last."""
        return (self.layers,) if self.encoder is None else (self.layers, self.encoder.layers)

    def num_layers(self, config: Config) -> int:
        """Decoder layers; as many as the encoder's where config.json does not say."""
        if self.encoder is not None and config.get(self.num_layers_key) is None:
            return self.num_encoder_layers(config)
        return need(config, self.num_layers_key)

    def num_encoder_layers(self, config: Config) -> int:
        return 0 if self.encoder is None else need(config, self.encoder.num_layers_key)

    def num_heads(self, config: Config) -> int:
        return need(config, self.num_heads_key)

    def num_kv_heads(self, config: Config) -> int:
        """Heads whose keys and values the cache holds."""
        if self.num_kv_heads_of is not None:
            return self.num_kv_heads_of(config)
        return self.num_heads(config) if config.get("num_key_value_heads") is None else kv_heads(config)

    def head_dim(self, config: Config) -> int:
        """Width of one attention head."""
        if config.get(self.head_dim_key) is not None:
            return need(config, self.head_dim_key)
        return self.head_dim_default or need(config, self.hidden_keys[-1]) // self.num_heads(config)

    def context(self, config: Config) -> int:
        """Tokens that the model is run with at most.

        A "longrope" model turns all positions differently once a text passes its first length, also those that the
        cache holds: it ends there.
        """
        stated = self.context_default if config.get(self.context_key) is None else need(config, self.context_key)
        scaled = [rope for rope in _ropes(config) if rope.get("long_factor")]
        key = "original_max_position_embeddings"
        firsts = [need(rope, key) for rope in scaled if rope.get(key)]
        return min([stated, *firsts, *[need(config, key) if config.get(key) else self.context_default for _ in scaled]])

    def softcap(self, config: Config) -> float | None:
        """The cap of the head's logits, or None."""
        cap = None if self.softcap_key is None else config.get(self.softcap_key)
        if cap is not None and not is_positive(cap):
            raise CheckpointError(f"config.json: {self.softcap_key} must be a number above 0, found {quoted(cap)}.")
        return cap

    def embedding_shape(self, config: Config) -> tuple[int, int]:
        """[vocab, width]; the head has the same shape."""
        width = next((key for key in self.hidden_keys if config.get(key) is not None), self.hidden_keys[-1])
        return need(config, "vocab_size"), need(config, width)

    def is_tied(self, config: Config) -> bool:
        return self.is_always_tied or says(config, "tie_word_embeddings", default=self.is_tied_by_default)

    def stored_base(self, names: Iterable[str]) -> str:
        """What stands for `base` in a file that holds these tensor names; the embedding may not be among them."""
        names = set(names)
        tail, layer = self.embedding.removeprefix(self.base), self.layers.removeprefix(self.base) + "."
        bases = (self.base, *self.base_aliases)
        found = (b for b in bases if b + tail in names or any(name.startswith(b + layer) for name in names))
        return next(found, self.base)


MOST = (1 << 31) - 1
"""No size in a config.json is larger; what is taken from one is checked against tensors before it is used."""


def need(config: Config, key: str) -> int:
    """A positive whole number of config.json, or a CheckpointError that names the key."""
    value = config.get(key)
    if type(value) is not int or not 0 < value <= MOST:
        raise CheckpointError(f"config.json: {key} must be a positive whole number, found {quoted(value)}.")
    return value


def says(config: Config, key: str, *, default: bool = False) -> bool:
    """A switch of config.json; `default` where it is absent. Raises CheckpointError for what is none."""
    value = config.get(key, default)
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"config.json: {key} must be true or false, found {quoted(value)}.")
    return bool(value)


def is_positive(value: Any) -> bool:
    """A finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 < value <= MOST and math.isfinite(value)


def kv_heads(config: Config) -> int:
    return need(config, "num_key_value_heads")


def _ropes(config: Config) -> Iterator[Mapping[str, Any]]:
    """Settings of the rotary embedding: one mapping, or one per layer type; under either of transformers' names."""
    for key in ("rope_parameters", "rope_scaling"):
        found = config.get(key)
        if found is None:
            continue
        if not isinstance(found, Mapping):
            raise CheckpointError(f"config.json: {key} must be an object of settings, found {quoted(found)}.")
        yield found
        yield from (each for each in found.values() if isinstance(each, Mapping))
