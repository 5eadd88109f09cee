"""The table of families agrees with transformers' own models."""

from typing import Any

import pytest
import torch
import transformers

from llmcad_actors.errors import CheckpointError
from llmcad_actors.families.families import FAMILIES, family_of
from tests.family_cases import CASES as TINY

SMALL: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama with a wide head": ("llama", SMALL | {"head_dim": 16}),
    "qwen3 with biases": ("qwen3", SMALL | {"attention_bias": True}),
    **{name: (case.model_type, case.fields) for name, case in TINY.items()},
}


def _model(model_type: str, fields: dict[str, Any]) -> Any:
    config = transformers.AutoConfig.for_model(model_type, **fields)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("case", CASES)
def test_names_and_shapes_are_those_of_the_transformers_model(case: str) -> None:
    model_type, fields = CASES[case]
    model = _model(model_type, fields)
    config = {"model_type": model_type, **fields}
    family = family_of(config)
    parameters = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    assert parameters[family.embedding] == family.embedding_shape(config)
    assert parameters[family.head] == family.embedding_shape(config)
    assert set(family.resident) <= parameters.keys()
    assert family.is_tied(config) == model.config.tie_word_embeddings
    assert model.base_model_prefix + "." == family.base
    prefix = f"{family.layers}.{family.num_layers(config) - 1}."
    leaves = {n.removeprefix(prefix): s for n, s in parameters.items() if n.startswith(prefix)}
    assert leaves
    assert not any(n.startswith(f"{family.layers}.{family.num_layers(config)}.") for n in parameters)
    if family.layer_shapes is not None:
        assert leaves == family.layer_shapes(config)


def test_each_architecture_is_in_one_row_only() -> None:
    types = [t for family in FAMILIES for t in family.model_types]
    assert len(types) == len(set(types))
    assert all(family_of({"model_type": t}).model_types == (t,) for t in types)


def test_an_unknown_architecture_names_the_known_ones() -> None:
    with pytest.raises(
        CheckpointError, match=r"says model_type 'mamba'.*known architectures: bart, falcon, gemma, gemma2"
    ):
        family_of({"model_type": "mamba"})
    with pytest.raises(CheckpointError, match="has no model_type"):
        family_of({})


def test_a_model_that_sees_is_refused_as_such() -> None:
    """Gemma 3 from 4B on: "gemma3_text", which is known, is only a part of it."""
    with pytest.raises(CheckpointError, match=r"'gemma3', a model of pictures and text.* runs text alone.*gemma3_text"):
        family_of({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}, "vision_config": {}})


@pytest.mark.parametrize("value", [None, 0, -1, "32", 1.5, True])
def test_a_config_without_usable_sizes_names_the_key(value: object) -> None:
    config = SMALL | {"model_type": "llama", "hidden_size": value}
    with pytest.raises(CheckpointError, match="hidden_size must be a positive whole number, found"):
        family_of(config).embedding_shape(config)
