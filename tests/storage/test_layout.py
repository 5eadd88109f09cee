"""Every tensor lands in exactly one place, and a wrong one is named before anything starts."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcad_actors.errors import CheckpointError
from llmcad_actors.storage.checkpoint import Checkpoint
from llmcad_actors.storage.layout import Layout, layout_of
from llmcad_actors.storage.safetensors_header import TensorInfo
from tests.storage.checkpoints import LLAMA, llama_shapes, write_checkpoint

PAIR = Path(__file__).parents[2] / "llmcad_actors/assets/pair"
GPT2: dict[str, Any] = {"model_type": "gpt2", "vocab_size": 20, "n_embd": 8, "n_layer": 2}
GPT2_SHAPES: dict[str, tuple[int, ...]] = {
    "wte.weight": (20, 8),
    "wpe.weight": (16, 8),
    "ln_f.weight": (8,),
    "ln_f.bias": (8,),
} | {f"h.{i}.{leaf}": s for i in (0, 1) for leaf, s in {"ln_1.weight": (8,), "mlp.c_fc.weight": (8, 32)}.items()}


def layout(path: Path, config: dict[str, Any], shapes: dict[str, tuple[int, ...]], **options: Any) -> Layout:
    return layout_of(Checkpoint.open(write_checkpoint(path, config, shapes)), **options)


def test_the_bundled_target_is_ten_layers_and_a_tied_head() -> None:
    found = layout_of(Checkpoint.open(PAIR / "target"))
    assert [s.name for s in found.layers] == [f"layer.{i}" for i in range(10)]
    assert [s.name for s in found.shards][-1] == "head.0"
    assert found.tied
    assert found.head[0].tensors == (found.embedding,)
    assert [i.name for i in found.resident] == ["model.norm.weight"]
    assert {found.leaf(i.name) for i in found.layers[3].tensors} >= {
        "self_attn.q_proj.weight",
        "input_layernorm.weight",
    }
    assert found.layer_list == "model.layers"


def test_every_tensor_is_in_exactly_one_place(tmp_path: Path) -> None:
    shapes = llama_shapes(LLAMA)
    found = layout(tmp_path, LLAMA, shapes)
    placed = [i.name for s in found.shards for i in s.tensors] + [i.name for i in (found.embedding, *found.resident)]
    assert sorted(placed) == sorted(shapes)
    assert not found.tied
    assert found.streamed_bytes == sum(s.nbytes for s in found.shards)


def test_tensors_of_a_shard_are_in_file_order(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, LLAMA, llama_shapes(LLAMA), num_files=2))
    for shard in layout_of(checkpoint).layers:
        order = [(i.file, i.offset) for i in shard.tensors]
        assert order == sorted(order)


@settings(max_examples=60, deadline=None)
@given(vocab=st.integers(1, 300), width=st.integers(1, 9), limit=st.integers(1, 2000))
def test_head_slices_cover_the_vocabulary_in_order(vocab: int, width: int, limit: int) -> None:
    config = {"model_type": "gpt_neox", "vocab_size": vocab, "hidden_size": width, "num_hidden_layers": 1}
    config |= {"tie_word_embeddings": True}
    shapes = {"embed_in.weight": (vocab, width), "layers.0.w": (1,)}
    shapes |= {f"final_layer_norm.{n}": (width,) for n in ("weight", "bias")}
    tensors, offset = {}, 123
    for name, shape in shapes.items():
        tensors["gpt_neox." + name] = TensorInfo("gpt_neox." + name, "BF16", shape, Path("f"), offset, offset)
        offset += 1
    embedding = TensorInfo("gpt_neox.embed_in.weight", "BF16", (vocab, width), Path("f"), 123, vocab * width * 2)
    checkpoint = Checkpoint(Path("d"), config, {}, tensors | {embedding.name: embedding})
    found = layout_of(checkpoint, max_shard_bytes=limit)
    position, row = 123, 0
    for slice_ in found.head:
        (info,) = slice_.tensors
        assert (info.offset, slice_.row_start) == (position, row)
        assert slice_.nbytes <= max(limit, width * 2)
        assert info.nbytes == info.shape[0] * width * 2 > 0
        position, row = position + info.nbytes, row + info.shape[0]
    assert (position, row) == (123 + vocab * width * 2, vocab)


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_gpt2_is_read_with_and_without_its_prefix(prefix: str, tmp_path: Path) -> None:
    found = layout(tmp_path, GPT2, {prefix + n: s for n, s in GPT2_SHAPES.items()})
    assert found.tied  # transformers' default for this family
    assert found.leaf(f"{prefix}h.1.mlp.c_fc.weight") == "mlp.c_fc.weight"
    assert found.parameter(f"{prefix}wpe.weight") == "transformer.wpe.weight"
    assert {found.parameter(i.name) for i in found.resident} == {f"transformer.{n}" for n in list(GPT2_SHAPES)[1:4]}
    with pytest.raises(ValueError, match="in no layer"):
        found.leaf(f"{prefix}wpe.weight")


def test_a_head_under_another_name_is_found(tmp_path: Path) -> None:
    config = {"model_type": "gpt_neox", "vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1}
    names = (
        "gpt_neox.final_layer_norm.weight",
        "gpt_neox.final_layer_norm.bias",
        "gpt_neox.layers.0.mlp.bias",
    )
    shapes: dict[str, tuple[int, ...]] = {"gpt_neox.embed_in.weight": (20, 8), "embed_out.weight": (20, 8)}
    found = layout(tmp_path, config, shapes | {n: (8,) for n in names})
    assert found.head[0].tensors[0].name == "embed_out.weight"
    assert found.parameter("embed_out.weight") == "lm_head.weight"


def test_opt_has_an_embedding_narrower_than_its_layers(tmp_path: Path) -> None:
    config = {"model_type": "opt", "vocab_size": 20, "hidden_size": 8, "word_embed_proj_dim": 4}
    config |= {"num_hidden_layers": 1}
    base = "model.decoder."
    shapes = {"embed_tokens.weight": (20, 4), "embed_positions.weight": (18, 8), "project_in.weight": (8, 4)}
    found = layout(tmp_path, config, {base + n: s for n, s in (shapes | {"layers.0.fc1.weight": (8, 8)}).items()})
    assert found.embedding.shape == (20, 4)
    assert len(found.resident) == 2


def test_a_stored_head_is_used_although_the_config_says_tied(tmp_path: Path) -> None:
    found = layout(tmp_path, LLAMA | {"tie_word_embeddings": True}, llama_shapes(LLAMA))
    assert not found.tied
    assert found.head[0].tensors[0].name == "lm_head.weight"


def test_layers_beyond_the_configured_count_are_left_out(tmp_path: Path) -> None:
    found = layout(tmp_path, LLAMA | {"num_hidden_layers": 1}, llama_shapes(LLAMA))
    assert len(found.layers) == 1
    assert [i.name for i in found.resident] == ["model.norm.weight"]


UP = "model.layers.1.mlp.up_proj.weight"
WRONG: dict[str, tuple[dict[str, tuple[int, ...]], list[str], str]] = {
    "wrong shape": (
        {UP: (25, 16)},
        [],
        r"up_proj.weight in .*found F32 \[25, 16\], expected F32 \[24, 16\] by conf",
    ),
    "missing in a layer": ({}, [UP], f"missing tensor {UP} in .*expected by config.json"),
    "missing embedding": ({}, ["model.embed_tokens.weight"], "missing tensor model.embed_tokens.weight"),
    "missing norm": ({}, ["model.norm.weight"], "missing tensor model.norm.weight"),
    "missing head": ({}, ["lm_head.weight"], "missing tensor lm_head.weight .*does not tie"),
    "wrong head": (
        {"lm_head.weight": (49, 16)},
        [],
        r"lm_head.weight .*found F32 \[49, 16\], expected F32 \[50, 16\]",
    ),
    "wrong embedding": (
        {"model.embed_tokens.weight": (50, 8)},
        [],
        r"found F32 \[50, 8\], expected F32 \[50, 16\]",
    ),
    "bias": (
        {"model.layers.0.self_attn.q_proj.bias": (16,)},
        [],
        "unexpected tensor .*q_proj.bias.*config.json has no",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_tensor_is_named_with_what_was_expected(case: str, tmp_path: Path) -> None:
    changed, removed, message = WRONG[case]
    shapes = {n: s for n, s in (llama_shapes(LLAMA) | changed).items() if n not in removed}
    with pytest.raises(CheckpointError, match=message):
        layout(tmp_path, LLAMA, shapes)


def test_without_a_shape_rule_every_layer_must_be_like_the_first(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"h.1.mlp.c_fc.weight .*\[8, 31\], expected F32 \[8, 32\] by layer 0"):
        layout(tmp_path / "a", GPT2, GPT2_SHAPES | {"h.1.mlp.c_fc.weight": (8, 31)})
    with pytest.raises(CheckpointError, match=r"missing tensor transformer.h.1.ln_1.weight .*expected by layer 0"):
        layout(tmp_path / "b", GPT2, {n: s for n, s in GPT2_SHAPES.items() if n != "h.1.ln_1.weight"})
    with pytest.raises(CheckpointError, match=r"unexpected tensor h.1.ln_1.weight .*layer 0 has no ln_1.weight"):
        layout(tmp_path / "c", GPT2, {n: s for n, s in GPT2_SHAPES.items() if n != "h.0.ln_1.weight"})
    with pytest.raises(CheckpointError, match=r"missing tensor transformer.wpe.weight"):
        layout(tmp_path / "d", GPT2, {n: s for n, s in GPT2_SHAPES.items() if n != "wpe.weight"})
