"""An enlarged model is an ordinary checkpoint of the asked size, and computes what its source computes."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from llmcad_actors.errors import CheckpointError, ConfigError, StorageError
from llmcad_actors.storage.checkpoint import Checkpoint
from llmcad_actors.storage.dtypes import decode
from llmcad_actors.storage.layout import layout_of
from llmcad_actors.storage.rows import read_bytes
from llmcad_actors.tools.enlarge import RECORD, enlarge
from llmcad_actors.tools.enlarge_shape import LlamaShape, choose_shape
from llmcad_actors.tools.enlarge_tensors import real_layers

PAIR = Path(__file__).parents[2] / "llmcad_actors/assets/pair/target"
SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,  # large weights: an error anywhere shows in the logits
    "bos_token_id": 0,
    "eos_token_id": 0,
    "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0},
}
WIDER: dict[str, Any] = {"hidden": 96, "intermediate": 80, "heads": 12, "kv_heads": 4, "layers": 7}


def small(path: Path, dtype: torch.dtype = torch.float32, **fields: Any) -> Path:
    """A random Llama checkpoint with norms that are not 1."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(SMALL | fields)))
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.to(dtype).save_pretrained(path)
    return path


def logits(path: Path, ids: torch.Tensor) -> torch.Tensor:
    """float32 logits [batch, length, vocab], by transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits
    return found


def assert_same_function(source: Path, enlarged: Path, vocab: int, tolerance: float = 1e-4) -> None:
    ids = torch.randint(0, vocab, (3, 20), generator=torch.Generator().manual_seed(1))
    expected, found = logits(source, ids), logits(enlarged, ids)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=tolerance)
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


def test_the_bundled_target_enlarged_computes_the_same(tmp_path: Path) -> None:
    made = enlarge(PAIR, tmp_path / "big", target_bytes=0, dtype="float32", hidden=512, layers=13)
    assert_same_function(PAIR, made, 4096)
    tokenizer = transformers.AutoTokenizer.from_pretrained(made)
    assert (
        tokenizer("import os\n").input_ids == transformers.AutoTokenizer.from_pretrained(PAIR)("import os\n").input_ids
    )
    assert (made / "generation_config.json").read_bytes() == (PAIR / "generation_config.json").read_bytes()


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grouped heads": ({}, WIDER),
    "tied": ({"tie_word_embeddings": True}, WIDER),
    "wider groups: shadow heads": ({}, WIDER | {"heads": 12, "kv_heads": 2}),
    "one group": ({"num_key_value_heads": 1}, WIDER | {"kv_heads": 1}),
    "no groups": ({"num_key_value_heads": 4}, WIDER | {"kv_heads": 12}),
    "groups appear": ({"num_key_value_heads": 4}, WIDER | {"kv_heads": 4}),
    "stated head_dim": ({"head_dim": 16}, WIDER),
    "layers only": ({}, {"hidden": 32, "intermediate": 48, "heads": 4, "kv_heads": 2, "layers": 5}),
    "width only": ({}, WIDER | {"layers": 3}),
    "nothing": ({}, {"hidden": 32, "intermediate": 48, "heads": 4, "kv_heads": 2, "layers": 3}),
    "width and layers by size": ({}, {"hidden": 64, "target_bytes": 1_000_000}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_random_model_enlarged_computes_the_same(case: str, tmp_path: Path) -> None:
    fields, wished = CASES[case]
    source = small(tmp_path / "small", **fields)
    made = enlarge(source, tmp_path / "big", **({"target_bytes": 0} | wished))
    layout_of(Checkpoint.open(made))
    assert_same_function(source, made, 61)


def test_in_bf16_it_is_exact_when_the_width_grows_by_a_power_of_four(tmp_path: Path) -> None:
    source = small(tmp_path / "small", torch.bfloat16)
    made = enlarge(source, tmp_path / "big", target_bytes=0, **(WIDER | {"hidden": 128, "heads": 16}))
    assert Checkpoint.open(made).dtype == "BF16"
    assert_same_function(source, made, 61)
    model = transformers.AutoModelForCausalLM.from_pretrained(made)
    assert model.dtype == torch.bfloat16


def test_another_dtype_can_be_asked_for(tmp_path: Path) -> None:
    source = small(tmp_path / "small", torch.bfloat16)
    for dtype in ("float16", "F32", "bf16"):
        made = enlarge(source, tmp_path / dtype, target_bytes=0, dtype=dtype, **(WIDER | {"hidden": 128, "heads": 16}))
        assert_same_function(source, made, 61)
    with pytest.raises(ConfigError, match="dtype 'int8' is not known; use one of bfloat16, float16, float32"):
        enlarge(source, tmp_path / "no", target_bytes=0, dtype="int8")


def test_it_reaches_the_size_asked_for_and_not_a_layer_more(tmp_path: Path) -> None:
    source, seen = small(tmp_path / "small"), []
    target = 1_500_000
    made = enlarge(
        source,
        tmp_path / "big",
        target_bytes=target,
        hidden=96,
        file_bytes=400_000,
        progress=lambda done, total: seen.append((done, total)),
    )
    checkpoint = Checkpoint.open(made)
    layer = layout_of(checkpoint).layers[0].nbytes
    assert target <= checkpoint.total_bytes < target + layer
    assert seen == sorted(seen)
    assert seen[-1] == (checkpoint.total_bytes, checkpoint.total_bytes)
    files = list(made.glob("*.safetensors"))
    assert len(files) > 3
    assert all(f.stat().st_size < 410_000 for f in files)


def test_the_config_keeps_everything_else(tmp_path: Path) -> None:
    source = small(tmp_path / "small")
    made = enlarge(source, tmp_path / "big", target_bytes=0, **WIDER)
    old, new = (json.loads((p / "config.json").read_text()) for p in (source, made))
    changed = {k for k in old if old[k] != new[k]}
    assert changed == {
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "num_hidden_layers",
        "rms_norm_eps",
    }
    assert new["head_dim"] == 8
    assert new["rms_norm_eps"] == pytest.approx(old["rms_norm_eps"] / 3)


def test_added_weights_are_noise_and_no_two_tensors_share_it(tmp_path: Path) -> None:
    made = enlarge(small(tmp_path / "small"), tmp_path / "big", target_bytes=0, **WIDER)
    seen: set[bytes] = set()
    for info in Checkpoint.open(made).tensors.values():
        values = decode(read_bytes(info).view(np.float32), "F32")
        assert np.isfinite(values).all()
        if "layers.1." in info.name:  # added: of v_proj and up_proj the real channels are zero, all else is noise
            zeros = info.shape[0] * 32 if info.name.endswith(("v_proj.weight", "up_proj.weight")) else 0
            assert (values == 0).sum() == zeros
        seen.add(values[-16:].tobytes())
    assert len(seen) == len(Checkpoint.open(made).tensors)


def test_the_seed_decides_the_noise(tmp_path: Path) -> None:
    source = small(tmp_path / "small")
    names = {
        n: enlarge(source, tmp_path / n, target_bytes=0, seed=s, **WIDER) for n, s in (("a", 1), ("b", 1), ("c", 2))
    }
    a, b, c = (
        read_bytes(Checkpoint.open(p).tensors["model.layers.1.mlp.up_proj.weight"]).tobytes() for p in names.values()
    )
    assert a == b != c


def test_a_complete_destination_is_kept(tmp_path: Path) -> None:
    source = small(tmp_path / "small")
    made = enlarge(source, tmp_path / "big", target_bytes=0, **WIDER)
    before = {f: f.stat().st_mtime_ns for f in made.iterdir()}

    def never(done: int, total: int) -> None:
        raise AssertionError

    assert enlarge(source, made, target_bytes=0, progress=never, **WIDER) == made
    assert {f: f.stat().st_mtime_ns for f in made.iterdir()} == before


def test_a_destination_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    source = small(tmp_path / "small")
    made = enlarge(source, tmp_path / "big", target_bytes=0, **WIDER)
    with pytest.raises(StorageError, match="holds something else; choose another folder"):
        enlarge(source, made, target_bytes=0, seed=1, **WIDER)
    other = small(tmp_path / "other", initializer_range=0.4)
    with pytest.raises(StorageError, match="holds something else"):
        enlarge(other, made, target_bytes=0, **WIDER)
    with pytest.raises(StorageError, match="holds something else"):
        enlarge(source, source, target_bytes=0, **WIDER)
    next(made.glob("*.safetensors")).write_bytes(b"")
    with pytest.raises(StorageError, match=r"is damaged .*remove it and run again"):
        enlarge(source, made, target_bytes=0, **WIDER)


def test_an_interrupted_run_leaves_nothing_and_a_killed_one_is_cleared_away(tmp_path: Path) -> None:
    source, big = small(tmp_path / "small"), tmp_path / "big"

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        enlarge(source, big, target_bytes=0, progress=interrupt, **WIDER)
    assert [p.name for p in tmp_path.iterdir()] == ["small"]
    foreign, *killed = (tmp_path / f"big{part}.partial" for part in (".01234567", "", ".89abcdef"))
    for partial in (foreign, *killed):
        partial.mkdir()
        (partial / "model-00001-of-00009.safetensors").touch()
    for partial in killed:
        (partial / RECORD).write_text("{}")
    big.mkdir()  # empty: as good as absent
    enlarge(source, big, target_bytes=0, **WIDER)
    assert list(tmp_path.glob("*.partial")) == [foreign]  # nothing says that llmcad made it
    assert len(list(big.glob("*.safetensors"))) == 1


def test_too_little_space_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"bytes free, the enlarged model needs 1,000,0\d\d,\d\d\d,\d\d\d"):
        enlarge(PAIR, tmp_path / "big", target_bytes=10**15)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot be written"):
        enlarge(PAIR, tmp_path / "file" / "big", target_bytes=0, hidden=512)


def _with_config(tmp_path: Path, **fields: Any) -> Path:
    path = tmp_path / "source"
    shutil.copytree(PAIR, path)
    (path / "config.json").write_text(json.dumps(json.loads((PAIR / "config.json").read_text()) | fields))
    return path


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "qwen3"}, "only Llama-architecture models can be enlarged, not 'qwen3'"),
        ({"attention_bias": True}, "attention_bias cannot be enlarged"),
        ({"mlp_bias": True}, "mlp_bias cannot be enlarged"),
        ({"num_hidden_layers": 11}, "missing tensor model.layers.10"),
    ],
)
def test_what_cannot_be_enlarged_is_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        enlarge(_with_config(tmp_path, **fields), tmp_path / "big", target_bytes=10**8)


BUNDLED = LlamaShape(vocab=4096, hidden=320, intermediate=864, heads=5, kv_heads=5, head_dim=64, layers=10, tied=True)


def test_the_usual_shape_of_two_and_a_half_gigabytes() -> None:
    shape = choose_shape(BUNDLED, target_bytes=2_500_000_000, item_bytes=2)
    assert (shape.hidden, shape.intermediate, shape.heads, shape.kv_heads, shape.layers) == (2048, 5632, 32, 8, 28)


@pytest.mark.parametrize(("target", "hidden"), [(930_000_000, 2048), (880_000_000, 1792), (70_000_000, 512)])
def test_a_smaller_size_gets_a_smaller_width_when_the_source_layers_are_too_many(target: int, hidden: int) -> None:
    shape = choose_shape(BUNDLED, target_bytes=target, item_bytes=2)
    assert shape.hidden == hidden
    assert target <= shape.parameters * 2


@pytest.mark.parametrize(
    ("wished", "message"),
    [
        ({"hidden": 256}, "hidden 256 is smaller than the source's 320"),
        ({"intermediate": 800}, "intermediate 800 is smaller than the source's 864"),
        ({"layers": 9}, "layers 9 is smaller than the source's 10"),
        ({"heads": 4}, "heads 4 is smaller than the source's 5"),
        ({"hidden": 512, "heads": 6, "kv_heads": 5}, "6 heads with 5 key/value heads do not hold"),
        ({"hidden": 512, "heads": 6, "kv_heads": 6}, "hidden 512 is not a multiple of 6 heads"),
        ({}, r"the smallest enlargement has [\d,]+ bytes, 1,000 asked for"),
    ],
)
def test_a_shape_that_does_not_fit_is_refused(wished: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_shape(BUNDLED, target_bytes=1000, item_bytes=2, **wished)


@given(
    kv_heads=st.integers(1, 10),
    group=st.integers(1, 8),
    head_dim=st.sampled_from([8, 64, 80, 128]),
    hidden_per_head=st.sampled_from([8, 64, 80, 128]),
    layers=st.integers(1, 40),
    target=st.integers(10**6, 10**12),
)
def test_every_chosen_shape_holds_its_source(
    kv_heads: int, group: int, head_dim: int, hidden_per_head: int, layers: int, target: int
) -> None:
    heads = kv_heads * group
    source = LlamaShape(
        vocab=1000,
        hidden=heads * hidden_per_head,
        intermediate=3 * heads * hidden_per_head,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        layers=layers,
        tied=False,
    )
    try:
        shape = choose_shape(source, target_bytes=target, item_bytes=2)
    except ConfigError as error:
        assert "smallest enlargement" in str(error)
        return
    assert shape.parameters * 2 >= target
    assert shape.group >= source.group
    assert shape.hidden % shape.heads == shape.heads % shape.kv_heads == 0
    assert min(shape.hidden - source.hidden, shape.kv_heads - source.kv_heads, shape.layers - layers) >= 0


@given(old=st.integers(1, 50), added=st.integers(0, 100))
def test_real_layers_keep_their_order_and_are_spread_out(old: int, added: int) -> None:
    positions = list(real_layers(old, old + added))
    assert len(positions) == old
    assert list(real_layers(old, old + added).values()) == list(range(old))
    gaps = np.diff([*positions, old + added])
    assert gaps.max() - gaps.min() <= 1
