"""Tiny checkpoints for tests: real files, arbitrary names and shapes."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmcad_actors.storage.writer import SafetensorsWriter

Shapes = Mapping[str, tuple[int, ...]]
NUMPY = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "U8": np.uint8}

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}


def llama_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of a Llama checkpoint with this config."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.{n}.weight": (hidden,) for n in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{layer}.self_attn.{n}_proj.weight": (kv, hidden) for n in "kv"}
        shapes |= {f"{layer}.self_attn.q_proj.weight": (q, hidden)}
        shapes |= {f"{layer}.self_attn.o_proj.weight": (hidden, q)}
        shapes |= {f"{layer}.mlp.{n}_proj.weight": (inner, hidden) for n in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj.weight": (hidden, inner)}
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def array(name: str, shape: tuple[int, ...], dtype: str = "F32") -> npt.NDArray[Any]:
    """Reproducible bytes for a tensor, different for each name."""
    seed = sum(ord(c) * 31**i for i, c in enumerate(name)) % 2**32
    values = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    return values.astype(NUMPY[dtype]) if dtype != "BF16" else values.view(np.uint32).astype(np.uint16)


def write_file(path: Path, shapes: Shapes, dtype: str = "F32") -> None:
    with SafetensorsWriter(path, [(n, dtype, s) for n, s in shapes.items()]) as writer:
        for name, shape in shapes.items():
            writer.write(name, array(name, shape, dtype))


def write_checkpoint(
    path: Path, config: Mapping[str, Any], shapes: Shapes, dtype: str = "F32", num_files: int = 1
) -> Path:
    """A model directory; several files get an index."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    if num_files == 1:
        write_file(path / "model.safetensors", shapes, dtype)
        return path
    weight_map: dict[str, str] = {}
    for i, names in enumerate(_deal(list(shapes), num_files)):
        file = f"model-{i + 1:05d}-of-{num_files:05d}.safetensors"
        write_file(path / file, {n: shapes[n] for n in names}, dtype)
        weight_map |= dict.fromkeys(names, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def _deal(names: Sequence[str], count: int) -> list[Sequence[str]]:
    return [names[i::count] for i in range(count)]
