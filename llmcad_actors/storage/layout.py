"""Cut a checkpoint into what is streamed (decoder layers, head slices) and what stays (everything small).

Decided from headers alone, and checked: a missing tensor or a wrong shape is found before anything starts.
Knows names, shapes and byte ranges; never reads a weight.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from llmcad_actors.core.quoting import shown
from llmcad_actors.errors import CheckpointError
from llmcad_actors.families.families import Family, Shapes, family_of, need
from llmcad_actors.storage.checkpoint import Checkpoint, TensorInfo

MIN_HEAD_SLICE_BYTES = 64 << 20
_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")


@dataclass(frozen=True, slots=True)
class ShardSpec:
    """What is streamed as one unit: a layer, or the head (a vocabulary slice of it)."""

    name: str  # "encoder.0", "layer.0", "head.0"
    tensors: tuple[TensorInfo, ...]  # by (file, offset); of a head slice: its rows' range and shape
    row_start: int = 0  # head slices: the first vocabulary row

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors)


@dataclass(frozen=True, slots=True)
class Layout:
    """A checkpoint as shards. `layers` are in order of execution."""

    family: Family
    stored_base: str  # what stands for family.base in this checkpoint's tensor names
    layers: tuple[ShardSpec, ...]
    head: tuple[ShardSpec, ...]
    embedding: TensorInfo
    resident: tuple[TensorInfo, ...]  # the rest: final norm, position tables, head bias; loaded once
    tied: bool  # the head is the embedding
    encoder: tuple[ShardSpec, ...] = ()  # layers that only a prompt's first pass runs, before the others

    def parameter(self, tensor: str) -> str:
        """transformers' parameter name of a stored tensor name."""
        return _parameter(self.family, self.stored_base, tensor)

    def leaf(self, tensor: str) -> str:
        """Name inside its layer: "model.layers.3.mlp.up_proj.weight" -> "mlp.up_proj.weight"."""
        for prefix in self.family.layer_lists:
            index = _layer_index(prefix, self.parameter(tensor))
            if index is not None:
                return index[1]
        raise ValueError(f"{tensor} is in no layer")

    @property
    def layer_list(self) -> str:
        """Module name of the list of decoder layers in transformers' model: "model.layers"."""
        return self.family.layers

    @property
    def shards(self) -> tuple[ShardSpec, ...]:
        """A prompt's first pass, in order; a later one leaves out the encoder."""
        return (*self.encoder, *self.layers, *self.head)

    @property
    def streamed_bytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards)


def layout_of(checkpoint: Checkpoint, family: Family | None = None, *, max_shard_bytes: int | None = None) -> Layout:
    """Cut `checkpoint` into shards.

    A head slice is at most `max_shard_bytes` (default: max(64 MiB, largest layer)).

    Raises CheckpointError naming the tensor, what was found and what is expected.
    """
    family, config = family or family_of(checkpoint.config), checkpoint.config
    base = family.stored_base(checkpoint.tensors)
    named = {_parameter(family, base, name): info for name, info in checkpoint.tensors.items()}
    embedding = _pop_embedding(named, checkpoint, family)
    _check_shape(embedding, family.embedding_shape(config))
    found, rest = _split(family.layers, named)
    leaves = _checked_layers(checkpoint, family, family.layers, found, family.num_layers(config))
    layers = _shards("layer", leaves)
    encoder: tuple[ShardSpec, ...] = ()
    if family.encoder is not None:
        found, rest = _split(family.encoder.layers, rest)
        prefix, count = family.encoder.layers, family.num_encoder_layers(config)
        encoder = _shards("encoder", _checked_layers(checkpoint, family, prefix, found, count))
    # A stored head is used even where the config says tied: transformers unties when the values differ.
    tied = family.is_tied(config) and rest.get(family.head, embedding) is embedding
    rest = {name: info for name, info in rest.items() if not (tied and info is embedding)}
    head = embedding if tied else _pop(rest, checkpoint, family.head)
    _check_shape(head, family.embedding_shape(config))
    for name in family.resident:
        info = _pop(dict(rest), checkpoint, name)
        _check_shape(info, (*info.shape[:-1], need(config, family.hidden_keys[-1])))
    limit = max_shard_bytes or max(MIN_HEAD_SLICE_BYTES, *(layer.nbytes for layer in (*encoder, *layers)))
    return Layout(
        family=family,
        stored_base=base,
        layers=layers,
        head=_head_slices(head, limit),
        embedding=embedding,
        resident=_sorted(rest.values()),
        tied=tied,
        encoder=encoder,
    )


def check_heads(checkpoint: Checkpoint, layout: Layout) -> None:
    """Raises CheckpointError where no tensor is as wide as config.json's keys: the cache would follow that number."""
    heads, width = layout.family.num_kv_heads(checkpoint.config), layout.family.head_dim(checkpoint.config)
    if not 0 < heads * width <= max(max(info.shape, default=1) for info in layout.layers[0].tensors):
        raise CheckpointError(
            f"config.json of {shown(checkpoint.path)} says {heads:,} heads of {width:,} for keys and values, and no "
            "tensor of a layer is that wide; weights and config.json do not belong together."
        )


def _parameter(family: Family, base: str, tensor: str) -> str:
    if tensor in family.head_aliases:
        return family.head
    head_module = family.head.rpartition(".")[0]
    if tensor.startswith(f"{head_module}.") or not tensor.startswith(base):
        return tensor
    return family.base + tensor.removeprefix(base)


def _layer_index(prefix: str, parameter: str) -> tuple[int, str] | None:
    """("model.layers.3.mlp.up_proj.weight") -> (3, "mlp.up_proj.weight"); None outside the layers."""
    number, _, leaf = parameter.removeprefix(prefix + ".").partition(".")
    return (int(number), leaf) if parameter.startswith(prefix + ".") and _NUMBER.fullmatch(number) else None


def _shards(name: str, leaves: Sequence[Mapping[str, TensorInfo]]) -> tuple[ShardSpec, ...]:
    return tuple(ShardSpec(f"{name}.{i}", _sorted(each.values())) for i, each in enumerate(leaves))


def _split(
    prefix: str, named: Mapping[str, TensorInfo]
) -> tuple[Mapping[int, dict[str, TensorInfo]], dict[str, TensorInfo]]:
    """Tensors by layer and leaf, as many as there are, and the rest."""
    leaves: dict[int, dict[str, TensorInfo]] = defaultdict(dict)
    rest: dict[str, TensorInfo] = {}
    for name, info in named.items():
        index = _layer_index(prefix, name)
        if index is None:
            rest[name] = info
        else:
            leaves[index[0]][index[1]] = info
    return leaves, rest


def _checked_layers(
    checkpoint: Checkpoint,
    family: Family,
    layer_list: str,
    found: Mapping[int, dict[str, TensorInfo]],
    num_layers: int,
) -> list[dict[str, TensorInfo]]:
    """The layers that config.json counts, every one in the file; those beyond its count are left out."""
    present = next((number for number in range(num_layers) if number not in found), num_layers)
    leaves = [found[number] for number in range(present)]
    if leaves:
        _check_layers(checkpoint, family, layer_list, leaves)
    if present < num_layers:
        leaf = f".{min(leaves[-1])}" if leaves else ""
        raise _missing(checkpoint, f"{layer_list}.{present}{leaf}", f"expected by config.json: {num_layers:,} layers")
    return leaves


def _check_layers(checkpoint: Checkpoint, family: Family, layer_list: str, leaves: list[dict[str, TensorInfo]]) -> None:
    """Every layer has the leaves and shapes that config.json gives, or those of layer 0."""
    for leaf in family.first_layer_only:
        if leaf not in leaves[0]:
            raise _missing(checkpoint, f"{layer_list}.0.{leaf}", f"expected of a {family.model_types[0]} model")
    leaves = [{leaf: info for leaf, info in leaves[0].items() if leaf not in family.first_layer_only}, *leaves[1:]]
    rule = family.layer_shapes
    expected = _expected(rule(checkpoint.config)) if rule else _as_stored(leaves[0])
    source = "config.json" if rule else "layer 0"
    for number, layer in enumerate(leaves):
        prefix = f"{layer_list}.{number}"
        for leaf in sorted(expected.keys() - layer.keys()):
            raise _missing(checkpoint, f"{prefix}.{leaf}", f"expected by {source}")
        for leaf in sorted(layer.keys() - expected.keys()):
            raise CheckpointError(
                f"unexpected tensor {shown(layer[leaf].name)} in {shown(layer[leaf].file)}: {source} has no "
                f"{shown(leaf)}; "
                "weights and config.json do not belong together."
            )
        for leaf, (shape, dtype) in expected.items():
            _check_shape(layer[leaf], shape, dtype, source)


def _expected(shapes: Shapes) -> dict[str, tuple[tuple[int, ...], str | None]]:
    return {leaf: (shape, None) for leaf, shape in shapes.items()}


def _as_stored(layer: Mapping[str, TensorInfo]) -> dict[str, tuple[tuple[int, ...], str | None]]:
    return {leaf: (info.shape, info.dtype) for leaf, info in layer.items()}


def _check_shape(
    info: TensorInfo, shape: tuple[int, ...], dtype: str | None = None, source: str = "config.json"
) -> None:
    if info.shape != shape or dtype not in (None, info.dtype):
        found, expected = f"{info.dtype} {list(info.shape)}", f"{dtype or info.dtype} {list(shape)}"
        raise CheckpointError(
            f"tensor {shown(info.name)} in {shown(info.file)}: found {found}, expected {expected} by {source}."
        )


def _missing(checkpoint: Checkpoint, name: str, why: str) -> CheckpointError:
    return CheckpointError(f"missing tensor {shown(name)} in {shown(checkpoint.path)} ({why}); fetch the model again.")


def _pop(named: dict[str, TensorInfo], checkpoint: Checkpoint, name: str) -> TensorInfo:
    if name not in named:
        why = f"expected of a {checkpoint.config.get('model_type')} model"
        if name.startswith("lm_head"):
            why += " whose config.json does not tie the head to the embedding"
        raise _missing(checkpoint, name, why)
    return named.pop(name)


def _pop_embedding(named: dict[str, TensorInfo], checkpoint: Checkpoint, family: Family) -> TensorInfo:
    """The embedding, under whichever of its names; no copy of it is left, nor what no model has.

    A tied model's may be stored as the head, which is then left too: whoever saved it chose one name for both.
    """
    others = [named.pop(name, None) for name in (*family.embedding_copies, *family.unused)]
    copies = [info for info in others[: len(family.embedding_copies)] if info is not None]
    if family.embedding not in named and not copies and family.is_tied(checkpoint.config):
        copies = [named[family.head]] if family.head in named else []
    return _pop(named, checkpoint, family.embedding) if family.embedding in named or not copies else copies[0]


def _sorted(tensors: Iterable[TensorInfo]) -> tuple[TensorInfo, ...]:
    return tuple(sorted(tensors, key=lambda info: (info.file, info.offset)))


def _head_slices(head: TensorInfo, limit: int) -> tuple[ShardSpec, ...]:
    """Slices as even as whole rows allow: a small last one would cost a read and save nothing."""
    vocab, row_bytes = head.shape[0], head.nbytes // head.shape[0]
    count = -(-vocab // max(1, limit // row_bytes))
    starts = [vocab * i // count for i in range(count + 1)]
    return tuple(
        ShardSpec(f"head.{i}", (head.rows(starts[i], starts[i + 1]),), row_start=starts[i]) for i in range(count)
    )
