"""Checkpoints of real size that take no room: true headers, and weights that are a hole in the file."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.core_model_loading import revert_weight_conversion

from tests.tiny import byte_tokenizer


def sparse_checkpoint(path: Path, model_type: str, fields: dict[str, Any], *, has_head: bool = False) -> Path:
    """A bfloat16 checkpoint of a model with this config, and only these fields in config.json.

    has_head: with a head in the file, also where transformers ties it.
    """
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": model_type, **fields}))
    config = AutoConfig.for_model(model_type, **fields)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        model = kind.from_config(config)
    stored = revert_weight_conversion(model, dict(model.named_parameters()))  # without a tied head; experts apart
    shapes = {name: list(tensor.shape) for name, tensor in stored.items()}
    if has_head:
        shapes["lm_head.weight"] = list(model.get_input_embeddings().weight.shape)
    write_header(path / "model.safetensors", shapes)
    byte_tokenizer().save_pretrained(path)
    return path


def write_header(file: Path, shapes: dict[str, list[int]]) -> None:
    """A safetensors file of BF16 tensors one after the other, whose bytes were never written."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(file, 8 + len(text) + offset)
