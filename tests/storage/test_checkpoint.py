"""A directory is understood from headers alone, and each way it can be broken has its own message."""

import contextlib
import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import example, given
from hypothesis import strategies as st

from llmcad_actors.errors import CheckpointError
from llmcad_actors.storage.checkpoint import Checkpoint
from llmcad_actors.storage.layout import layout_of
from llmcad_actors.storage.safetensors_header import TensorInfo, read_header
from tests.storage.checkpoints import LLAMA, llama_shapes, write_checkpoint, write_file

PAIR = Path(__file__).parents[2] / "llmcad_actors/assets/pair/target"
SHAPES = llama_shapes(LLAMA)
INDEX = "model.safetensors.index.json"


def raw(info: TensorInfo) -> bytes:
    return info.file.read_bytes()[info.offset : info.offset + info.nbytes]


def test_offsets_agree_with_the_safetensors_library() -> None:
    checkpoint = Checkpoint.open(PAIR)
    assert checkpoint.dtype == "BF16"
    assert checkpoint.total_bytes == sum(i.nbytes for i in checkpoint.tensors.values())
    library = dict(safetensors.deserialize((PAIR / "model.safetensors").read_bytes()))  # type: ignore[no-untyped-call]
    assert library.keys() == checkpoint.tensors.keys()
    name = "model.layers.3.mlp.up_proj.weight"
    assert raw(checkpoint.tensors[name]) == bytes(library[name]["data"])
    assert list(checkpoint.tensors[name].shape) == library[name]["shape"]
    assert checkpoint.generation_settings["eos_token_id"] == 0


def test_one_file_and_many_files_hold_the_same_tensors(tmp_path: Path) -> None:
    one = Checkpoint.open(write_checkpoint(tmp_path / "one", LLAMA, SHAPES))
    many = Checkpoint.open(write_checkpoint(tmp_path / "many", LLAMA, SHAPES, num_files=3))
    assert one.tensors.keys() == many.tensors.keys() == SHAPES.keys()
    assert all(raw(one.tensors[n]) == raw(many.tensors[n]) for n in SHAPES)
    assert len({i.file for i in many.tensors.values()}) == 3
    assert one.generation_settings == one.config


def test_rows_of_a_tensor_are_a_range_of_its_bytes(tmp_path: Path) -> None:
    info = Checkpoint.open(write_checkpoint(tmp_path, LLAMA, SHAPES)).tensors["lm_head.weight"]
    whole = np.frombuffer(raw(info), np.float32).reshape(info.shape)
    part = info.rows(7, 19)
    assert part.shape == (12, 16)
    np.testing.assert_array_equal(np.frombuffer(raw(part), np.float32).reshape(part.shape), whole[7:19])


def test_masks_and_rotary_tables_of_old_checkpoints_are_left_out(tmp_path: Path) -> None:
    extra = {
        "h.0.attn.bias": (1, 1, 4, 4),
        "h.0.attn.masked_bias": (),
        "gpt_neox.layers.0.attention.bias": (1, 1, 4, 4),
        "model.layers.0.self_attn.rotary_emb.inv_freq": (2,),
    }
    kept = {"h.0.attn.c_attn.bias": (4,), "gpt_neox.layers.0.attention.dense.bias": (4,)}
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, LLAMA, kept | extra))
    assert checkpoint.tensors.keys() == kept.keys()
    assert checkpoint.total_bytes == 32


Break = Callable[[Path], object]


def _truncate(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _cut_in_header(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:50])


def _append(path: Path) -> None:
    with (path / "model.safetensors").open("ab") as stream:
        stream.write(b"x")


def _header(path: Path, header: bytes) -> None:
    (path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)


def _entry(path: Path, entry: object) -> None:
    _header(path, json.dumps({"w": entry}).encode())


def _info(shape: list[Any], begin: object, end: object) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


def _config(path: Path, **fields: object) -> None:
    (path / "config.json").write_text(json.dumps(LLAMA | fields))


def _swap(path: Path, *names: str) -> None:
    (path / "model.safetensors").unlink()
    for name in names:
        (path / name).write_bytes(b"{}")


BROKEN: dict[str, tuple[Break, str]] = {
    "no config": (lambda p: (p / "config.json").unlink(), r"has no config.json; is it a .*model directory"),
    "bad config": (lambda p: (p / "config.json").write_text("{"), r"config.json cannot be read as JSON"),
    "config is a list": (lambda p: (p / "config.json").write_text("[]"), "config.json is not a JSON object"),
    "bad generation config": (
        lambda p: (p / "generation_config.json").write_text("{,"),
        "generation_config.json cannot be read as JSON",
    ),
    "no weights": (_swap, "no weights.*fetch the weights"),
    "pickle .bin": (
        lambda p: _swap(p, "pytorch_model.bin"),
        r"pytorch_model\.bin.*safetensors.*`llmcad convert .* OUT`",
    ),
    "pickle .pt": (lambda p: _swap(p, "model.pt"), r"only pickle weights \(model.pt\).*fetch the model as safetensors"),
    "pickle .pth": (lambda p: _swap(p, "consolidated.00.pth"), "only pickle weights"),
    "gguf": (lambda p: _swap(p, "model-q4.gguf"), r"GGUF file \(model-q4.gguf\).*does not read"),
    "adapter": (
        lambda p: _swap(p, "adapter_config.json", "adapter_model.safetensors"),
        "only an adapter; merge",
    ),
    "no index": (lambda p: _swap(p, "model-00001-of-00002.safetensors"), "neither .* nor .*fetch the index"),
    "truncated": (
        _truncate,
        r"model.safetensors is truncated: [\d,]+ bytes on disk, its header declares [\d,]+",
    ),
    "cut in the header": (_cut_in_header, "is truncated: its 50 bytes do not hold its header"),
    "too long": (_append, "longer than declared"),
    "absurd header": (
        lambda p: (p / "model.safetensors").write_bytes(b"\xff" * 64),
        "not a valid safetensors file: it declares a header of",
    ),
    "header not JSON": (lambda p: _header(p, b"{nonsense"), "the header is not JSON"),
    "header not an object": (lambda p: _header(p, b"[1]"), "the header is not a JSON object"),
    "malformed entry": (lambda p: _entry(p, {"dtype": "F32"}), "the entry of w is malformed"),
    "impossible range": (
        lambda p: _entry(p, {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}),
        r"w \(F32, shape \[4\]\) cannot occupy bytes \[0, 8\)",
    ),
    "an entry twice": (
        lambda p: _header(p, b'{"w":{"dtype":"F32","shape":[],"data_offsets":[0,4]},"w":{}}' + b"1234"),
        "'w' stands in it more than once",
    ),
    "a deep header": (lambda p: _header(p, b'{"w":' * 20_000), "the header is not JSON .*nested"),
    "axes without end": (lambda p: _entry(p, _info([1] * 99, 0, 4)), "the entry of w is malformed"),
    "an axis of 2^61": (lambda p: _entry(p, _info([0, 2**61], 0, 0)), r"w \(F32, shape .* cannot occupy"),
    "a negative axis": (lambda p: _entry(p, _info([-1, -1], 0, 4)), "the entry of w is malformed"),
    "axes that are true": (lambda p: _entry(p, _info([True], 0, 4)), "the entry of w is malformed"),
    "an axis with a fraction": (lambda p: _entry(p, _info([1.0], 0, 4)), "the entry of w is malformed"),
    "offsets of text": (lambda p: _entry(p, _info([1], "0", "4")), "the entry of w is malformed"),
    "a name without end": (
        lambda p: _header(p, b'{"' + b"w" * 9999 + b'": 1}'),
        r"the entry of w{100,} \.\.\. w+ is malf",
    ),
    "3 GB of config": (lambda p: os.truncate(p / "config.json", 3 * 10**9), "has 3,000,000,000 bytes, and such a file"),
    "masks alone": (lambda p: write_file(p / "model.safetensors", {"h.0.attn.bias": (2,)}), "hold no tensors"),
    "no tensors": (lambda p: _header(p, b"{}"), "hold no tensors"),
    "quantised": (
        lambda p: write_file(p / "model.safetensors", {"w": (4,)}, "U8"),
        "w .*is stored as U8.*BF16, F16",
    ),
    "quantisation config": (
        lambda p: _config(p, quantization_config={"bits": 4}),
        "quantised model.*original",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_each_broken_directory_says_what_is_wrong(case: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, LLAMA, SHAPES)
    spoil, message = BROKEN[case]
    spoil(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_missing_directory_and_a_file_in_its_place_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        Checkpoint.open(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is not a directory"):
        Checkpoint.open(tmp_path / "file")


def test_a_directory_of_gguf_files_without_config_says_so(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").touch()
    with pytest.raises(CheckpointError, match=r"no config.json but a GGUF file \(m.gguf\)"):
        Checkpoint.open(tmp_path)


def _edit_index(path: Path, edit: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((path / INDEX).read_text())
    edit(index["weight_map"])
    (path / INDEX).write_text(json.dumps(index))


def test_an_index_that_disagrees_with_the_files_is_refused(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, LLAMA, SHAPES, num_files=2)
    (path / INDEX).with_suffix(".bak").write_text((path / INDEX).read_text())
    _edit_index(path, lambda m: m.update(ghost=m["lm_head.weight"]))
    with pytest.raises(CheckpointError, match=r"places tensor ghost in model-0000.*does not contain it"):
        Checkpoint.open(path)
    (path / INDEX).write_text("{}")
    with pytest.raises(CheckpointError, match="no usable weight_map"):
        Checkpoint.open(path)
    (path / INDEX).write_text((path / INDEX).with_suffix(".bak").read_text())
    (path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names model-00002-of-00002.safetensors, which is absent"):
        Checkpoint.open(path)


SPANS = st.lists(st.integers(0, 40), min_size=2, max_size=6)


@given(ends=SPANS, moved=st.integers(0, 5), by=st.integers(-8, 8))
@example(ends=[8, 8], moved=1, by=-8)  # two tensors in one place: another text, and nothing said
def test_tensors_must_cover_the_data_once(
    tmp_path_factory: pytest.TempPathFactory, ends: list[int], moved: int, by: int
) -> None:
    """As the format says; the safetensors library refuses exactly the same files."""
    file = tmp_path_factory.mktemp("cover") / "model.safetensors"
    begins = [sum(ends[:i]) for i in range(len(ends))]
    begins[moved % len(ends)] += by
    entries = {
        f"w{i}": {"dtype": "U8", "shape": [size], "data_offsets": [begin, begin + size]}
        for i, (begin, size) in enumerate(zip(begins, ends, strict=True))
    }
    header = json.dumps(entries).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(sum(ends)))
    try:
        safetensors.deserialize(file.read_bytes())  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError:
        with pytest.raises(CheckpointError, match=r"is not a valid safetensors file|is truncated|is longer"):
            read_header(file)
    else:
        assert len(read_header(file)) == len(ends)


@pytest.mark.parametrize("key", ["num_hidden_layers", "vocab_size", "hidden_size", "num_attention_heads", "head_dim"])
@pytest.mark.parametrize("value", [100_000_000, 2**31 - 1, 10**30, 1e400, "4", True, [4], None, -1])
def test_a_forged_number_costs_nothing(key: str, value: object, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, LLAMA | {key: value}, SHAPES)
    tracemalloc.start()
    with contextlib.suppress(CheckpointError):  # without a head_dim it is calculated
        layout_of(Checkpoint.open(path))
        assert (key, value) == ("head_dim", None)
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


@pytest.mark.parametrize(
    "file", ["../other/model.safetensors", "/etc/passwd", "a/../../x", "", ".", "a\0b", "..", "x" * 5000, "\ud800"]
)
def test_an_index_stays_in_its_folder(file: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "other", LLAMA, SHAPES)
    path = write_checkpoint(tmp_path / "model", LLAMA, SHAPES, num_files=2)
    _edit_index(path, lambda m: m.update(dict.fromkeys(m, file)))
    with pytest.raises(CheckpointError, match=r"no file of the model's folder|cannot be opened|is absent") as caught:
        Checkpoint.open(path)
    assert len(str(caught.value)) < 1000


def test_files_may_be_links_as_in_the_hugging_face_cache(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "blobs", LLAMA, SHAPES, num_files=2)
    (tmp_path / "snapshot").mkdir()
    for file in path.iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    assert Checkpoint.open(tmp_path / "snapshot").tensors.keys() == SHAPES.keys()


@pytest.mark.parametrize("name", ["a" * 5000, "a\0b", "loop/x", "file/x", "\ud800"])
def test_a_folder_that_cannot_be_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot be opened|does not exist") as caught:
        Checkpoint.open(tmp_path / name)
    assert len(str(caught.value)) < 400
