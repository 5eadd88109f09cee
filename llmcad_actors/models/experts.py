"""Mixtures of experts: files hold every expert by itself, transformers computes with all of them joined.

Joining a layer's experts would copy the layer. Here an expert's tensors are joined when it is asked for: one expert
at a time, and only those that a row was sent to.
"""

import re
from collections.abc import Mapping
from typing import Any, TypeVar

import torch

from llmcad_actors.families.family import Family

T = TypeVar("T")
Shape = tuple[int, ...]
EXPERT = re.compile(r"(.*\bexperts\.)(\d+)\.(.*)")


class Experts:
    """Stands for a tensor [experts, rows, columns]: `experts[i]` joins the parts of expert i along their rows."""

    def __init__(self, parts: tuple[dict[int, torch.Tensor], ...]) -> None:
        self._parts = parts

    def __getitem__(self, index: torch.Tensor | int) -> torch.Tensor:
        found = [part[int(index)] for part in self._parts]
        return found[0] if len(found) == 1 else torch.cat(found)


def joined_name(family: Family, name: str) -> str:
    """The model's parameter that a stored tensor is, or is part of."""
    rest, parts = _split(family, {name: None}) if family.experts else ({name: None}, {})
    return next(iter([*rest, *parts]))


def with_experts(family: Family, weights: Mapping[str, torch.Tensor]) -> Mapping[str, Any]:
    """A layer's tensors by the model's parameter names; those of experts as `Experts`."""
    if not family.experts:
        return weights
    rest, parts = _split(family, weights)
    return rest | {name: Experts(tuple(parts[name])) for name in parts}


def shapes_with_experts(family: Family, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """The same for shapes, of experts that are all alike; a missing or odd one leaves a shape no model has."""
    rest, parts = _split(family, shapes)
    return rest | {name: _joined_shape(each) for name, each in parts.items()}


def _split(family: Family, tensors: Mapping[str, T]) -> tuple[dict[str, T], dict[str, list[dict[int, T]]]]:
    """Tensors of no expert; and by joined parameter, for each of its parts, the experts' tensors."""
    rest: dict[str, T] = {}
    parts: dict[str, list[dict[int, T]]] = {}
    for name, tensor in tensors.items():
        name = name.replace(*family.block) if family.block else name
        found = EXPERT.fullmatch(name)
        if found is None:
            rest[name] = tensor
            continue
        prefix, index, leaf = found.groups()
        joined, pieces = next((j, p) for j, p in family.experts.items() if leaf in p)
        parts.setdefault(prefix + joined, [{} for _ in pieces])[pieces.index(leaf)][int(index)] = tensor
    return rest, parts


def _joined_shape(parts: list[dict[int, Shape]]) -> Shape:
    alike = all(len(set(part.values())) == 1 and part.keys() == parts[0].keys() for part in parts)
    whole = sorted(parts[0]) == list(range(len(parts[0])))
    if not (alike and whole):
        return ()
    first = [part[0] for part in parts]
    return (len(parts[0]), sum(shape[0] for shape in first), *first[0][1:])
