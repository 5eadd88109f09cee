"""Checkpoints of real size that take no room: true headers, and weights that are a hole in the file."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from tests.tiny import byte_tokenizer


def sparse_checkpoint(path: Path, model_type: str, fields: dict[str, Any]) -> Path:
    """A bfloat16 checkpoint of a model with this config, and only these fields in config.json."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": model_type, **fields}))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields))
    stored = revert_weight_conversion(model, dict(model.named_parameters()))  # without a tied head; experts apart
    write_header(path / "model.safetensors", {name: list(tensor.shape) for name, tensor in stored.items()})
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
