"""A transformers model without weights: parameters on the meta device, buffers real.

Each layer borrows its weights while it runs (`borrowed`) and keeps none afterwards. The skeleton does not
know where weights come from, nor what a tree is.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from llmcad_actors.families.families import family_of
from llmcad_actors.families.family import Family
from llmcad_actors.models.loading import reads_model
from llmcad_actors.models.thin_imports import with_shapes


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules made inside have meta parameters; buffers are computed as ever (rotary tables, masks)."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None:
            param = nn.Parameter(param.to("meta"), requires_grad=False)
        register(module, name, param)

    nn.Module.register_parameter = on_meta  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def build_skeleton(path: Path, dtype: torch.dtype) -> nn.Module:
    """The model of the checkpoint at `path`, in eval mode, computing in `dtype`, holding no weights.

    Raises CheckpointError where transformers cannot make one of config.json.
    """
    with reads_model(path):
        return _build(path, dtype)


def _build(path: Path, dtype: torch.dtype) -> nn.Module:
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    family = family_of(config.to_dict())
    if family.experts:
        config._experts_implementation = "eager"  # asks for one expert after the other: models/experts.py
    model = with_shapes(lambda: _without_weights(family, config, dtype))
    for module in model.modules():
        create = getattr(module, "create_weight", None)
        if create is not None:  # sinusoidal positions, which files need not hold
            module._parameters["weight"] = create()
    return model.eval()


def _without_weights(family: Family, config: Any, dtype: torch.dtype) -> nn.Module:
    with parameters_on_meta():
        model: nn.Module = auto_model(family).from_config(config, dtype=dtype)
    return model


def auto_model(family: Family) -> Any:
    """transformers' class that builds and loads models of the family."""
    return AutoModelForCausalLM if family.encoder is None else AutoModelForSeq2SeqLM


class Slots:
    """Where the parameters of one module tree live, by dotted name; weights are put in and taken out."""

    def __init__(self, module: nn.Module) -> None:
        self._slots = {
            f"{prefix}.{name}" if prefix else name: (owner, name)
            for prefix, owner in module.named_modules(remove_duplicate=False)
            for name in owner._parameters
        }
        self._empty = {key: owner._parameters[name] for key, (owner, name) in self._slots.items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: tuple(param.shape) for key, param in self._empty.items() if param is not None}

    def fill(self, weights: Mapping[str, torch.Tensor]) -> None:
        for key, tensor in weights.items():
            owner, name = self._slots[key]
            owner._parameters[name] = tensor

    def clear(self) -> None:
        for key, (owner, name) in self._slots.items():
            owner._parameters[name] = self._empty[key]

    @contextlib.contextmanager
    def borrowed(self, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Weights [name -> tensor] are in place inside the block, and gone after it even when it raises."""
        self.fill(weights)
        try:
            yield
        finally:
            self.clear()


def stream_embedding(
    embedding: nn.Embedding, lookup: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
) -> None:
    """Make an embedding look its ids up in the small table that `lookup` gives: (weight, ids local to it)."""
    embedding.padding_idx = None  # local ids know none
    forward, slots = embedding.forward, Slots(embedding)

    def run(input: torch.Tensor) -> torch.Tensor:
        weight, local = lookup(input)
        with slots.borrowed({"weight": weight}):
            return forward(local)

    embedding.forward = run  # type: ignore[method-assign]


def stream_layers(
    layers: nn.ModuleList,
    weights_of: Callable[[int], contextlib.AbstractContextManager[Mapping[str, torch.Tensor]]],
) -> None:
    """Make every layer run its forward inside `weights_of(index)`, which lends it its weights."""
    for index, layer in enumerate(layers):
        layer.forward = _streamed(index, layer.forward, Slots(layer), weights_of)


def _streamed(
    index: int,
    forward: Callable[..., Any],
    slots: Slots,
    weights_of: Callable[[int], contextlib.AbstractContextManager[Mapping[str, torch.Tensor]]],
) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with weights_of(index) as weights, slots.borrowed(weights):
            return forward(*args, **kwargs)

    return run
