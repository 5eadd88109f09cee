"""A pickled checkpoint becomes safetensors: the same model, in bounded memory, without running a line of the pickle."""

import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import llmcad_actors.tools.convert as module
from llmcad_actors.errors import CheckpointError, ConfigError, LlmcadError, MemoryCapError, StorageError
from llmcad_actors.storage.checkpoint import Checkpoint
from llmcad_actors.tools.convert import convert
from tests.fuzz_files import spoil_bytes
from tests.plain import Plain, encode
from tests.tiny import PROMPTS, byte_tokenizer, tiny_llama


def pickled(path: Path, *, shards: int = 1, old: bool = False, **shape: Any) -> tuple[Path, Plain]:
    """A tiny model as torch.save leaves it, and the model itself."""
    original = Plain(tiny_llama(path / "original", layers=2, **shape))
    folder = path / "pickled"
    folder.mkdir()
    for file in original.path.iterdir():
        if file.suffix == ".json":
            (folder / file.name).write_bytes(file.read_bytes())
    save(folder, dict(original.model.state_dict()), shards=shards, old=old)
    return folder, original


def save(folder: Path, weights: dict[str, torch.Tensor], *, shards: int = 1, old: bool = False) -> None:
    options = {"_use_new_zipfile_serialization": not old}
    if shards == 1:
        torch.save(weights, folder / "pytorch_model.bin", **options)
        return
    weight_map = {name: f"pytorch_model-{i % shards + 1:05d}-of-{shards:05d}.bin" for i, name in enumerate(weights)}
    for file in set(weight_map.values()):
        torch.save({n: w for n, w in weights.items() if weight_map[n] == file}, folder / file, **options)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def same_model(out: Path, original: Plain) -> None:
    ids = encode(original.path, PROMPTS[0])
    assert Plain(out).greedy(ids, 24) == original.greedy(ids, 24)
    state, found = original.model.state_dict(), AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert state.keys() == found.keys()
    assert all(torch.equal(state[name], found[name]) for name in state)


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        ({}, {}),
        ({"shards": 3}, {}),
        ({"old": True}, {}),
        ({}, {"tied": True}),
        ({}, {"dtype": torch.bfloat16}),
    ],
    ids=str,
)
def test_the_converted_model_is_the_original(tmp_path: Path, layout: dict[str, Any], shape: dict[str, Any]) -> None:
    source, original = pickled(tmp_path, **layout, **shape)
    seen: list[tuple[int, int]] = []
    out = convert(source, tmp_path / "out", progress=lambda done, total: seen.append((done, total)), file_bytes=50_000)
    same_model(out, original)
    checkpoint = Checkpoint.open(out)
    assert seen[-1] == (checkpoint.total_bytes, checkpoint.total_bytes)
    assert len(list(out.glob("*.safetensors"))) > 1
    assert {f.name for f in source.glob("token*")} | {"generation_config.json"} <= {f.name for f in out.iterdir()}
    assert ("lm_head.weight" in checkpoint.tensors) == (not shape.get("tied"))


def test_buffers_are_left_out_and_the_head_is_stored_once(tmp_path: Path) -> None:
    """GPT-2 as old transformers saved it."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=257, n_positions=64, n_embd=24, n_layer=2, n_head=2))
    model.config.save_pretrained(tmp_path / "in")
    byte_tokenizer().save_pretrained(tmp_path / "in")
    weights = dict(model.state_dict())
    assert weights["lm_head.weight"].data_ptr() == weights["transformer.wte.weight"].data_ptr()
    save(tmp_path / "in", weights | {"transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64, dtype=torch.bool)})
    out = convert(tmp_path / "in", tmp_path / "out")
    assert Checkpoint.open(out).tensors.keys() == weights.keys() - {"lm_head.weight"}
    ids = torch.arange(9)[None]
    with torch.inference_mode():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(out)(ids).logits, model.eval()(ids).logits)


def test_another_dtype_may_be_asked_for(tmp_path: Path) -> None:
    source, original = pickled(tmp_path)
    out = convert(source, tmp_path / "out", dtype="bfloat16")
    assert Checkpoint.open(out).dtype == "BF16"
    found = AutoModelForCausalLM.from_pretrained(out, dtype="auto").state_dict()
    assert all(torch.equal(w.bfloat16(), found[name]) for name, w in original.model.state_dict().items())


def test_parts_of_any_size_and_order_make_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, original = pickled(tmp_path)
    weights = torch.load(source / "pytorch_model.bin")
    transposed = {name: w.t().contiguous().t() if w.ndim == 2 else w for name, w in weights.items()}
    save(source, transposed)
    monkeypatch.setattr(module, "BLOCK_BYTES", 1000)
    same_model(convert(source, tmp_path / "out"), original)


def test_a_finished_file_is_not_made_again(tmp_path: Path) -> None:
    source, original = pickled(tmp_path)

    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", progress=interrupt, file_bytes=50_000)
    assert not (tmp_path / "out").exists()
    (begun,) = tmp_path.glob("out.*.partial")
    finished = {file.name: file.stat().st_ino for file in begun.glob("*.safetensors")}
    assert len(finished) > 1
    (begun / "model.safetensors.1.partial").write_bytes(b"of a run that was killed")
    out = convert(source, tmp_path / "out", file_bytes=50_000)
    assert finished.items() <= {file.name: file.stat().st_ino for file in out.glob("*.safetensors")}.items()
    assert not list(out.glob("*.partial"))
    same_model(out, original)


def test_what_is_made_already_is_kept_and_what_is_not_ours_is_not_touched(tmp_path: Path) -> None:
    source, _ = pickled(tmp_path)
    out = convert(source, tmp_path / "out")
    before = {file.name: file.stat().st_ino for file in out.iterdir()}
    convert(source, out)
    assert {file.name: file.stat().st_ino for file in out.iterdir()} == before
    with pytest.raises(StorageError, match="holds something else"):
        convert(source, out, dtype="bfloat16")
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.0123abcd.partial").mkdir()
    convert(source, tmp_path / "new")
    assert len(list(tmp_path.glob("new.*"))) == 2


TOGETHER = """
import sys, time
from pathlib import Path
from llmcad_actors.tools.convert import convert

began = False

def progress(done, total):
    global began
    if not began:
        began = True
        print("writing", flush=True)
        sys.stdin.readline()

convert(Path(sys.argv[1]), Path(sys.argv[2]), progress=progress, file_bytes=50_000)
"""


def test_two_that_convert_the_same_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    """And a third goes on with what a killed one left, not with what the living ones write."""
    source, original = pickled(tmp_path)
    out = tmp_path / "out"
    command = [sys.executable, "-c", TOGETHER, str(source), str(out)]
    runs = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    for run in runs:
        assert run.stdout is not None
        assert run.stdout.readline() == "writing\n"
    assert len(list(tmp_path.glob("out.*.partial"))) == 3
    runs[0].kill()
    runs[0].communicate(timeout=60)
    for run in runs[1:]:
        run.communicate("\n", timeout=60)
        assert run.returncode == 0
    same_model(out, original)
    (left,) = tmp_path.glob("out.*.partial")
    shutil.rmtree(out)
    inode = left.stat().st_ino
    convert(source, out, file_bytes=50_000)
    assert out.stat().st_ino == inode
    assert not list(tmp_path.glob("out.*"))


class Malice:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("way", ["torch", "pickle 2", "pickle 4"])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path: Path, way: str) -> None:
    source, _ = pickled(tmp_path)
    file, content = source / "pytorch_model.bin", {"weight": Malice(tmp_path / "harm")}
    if way == "torch":
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps(content, protocol=int(way[-1])))
    with pytest.raises(CheckpointError, match=r"wants to .*: it is refused, and nothing of it was run"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "harm").exists()
    torch.load(file, weights_only=False) if way == "torch" else pickle.loads(file.read_bytes())
    assert (tmp_path / "harm").exists()  # so it would have


@pytest.mark.parametrize("cut", [4, 3000, 100_000])
def test_a_damaged_pickle_is_refused(tmp_path: Path, cut: int) -> None:
    source, _ = pickled(tmp_path)
    file = source / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:-cut] if cut > 4 else b"junk")
    with pytest.raises(CheckpointError, match="is damaged"):
        convert(source, tmp_path / "out")


def test_what_a_pickle_says_is_borne_out_by_its_bytes(tmp_path: Path) -> None:
    """One stored number is not a billion, and no part is larger than the file."""
    folder, _ = pickled(tmp_path)
    file = folder / "pytorch_model.bin"
    save(folder, {"model.embed_tokens.weight": torch.zeros(1).expand(10**9, 2)})
    with pytest.raises(CheckpointError, match=r"tensor model\.embed_tokens\.weight is larger than what is stored"):
        convert(folder, tmp_path / "out")
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(50_000_000))
    with pytest.raises(CheckpointError, match="its parts are compressed"):
        convert(folder, tmp_path / "out")


@pytest.mark.parametrize("seed", range(40))
def test_a_spoilt_pickle_is_refused_or_read(tmp_path: Path, seed: int) -> None:
    """Whatever unpickling raises."""
    rng, file = random.Random(seed), tmp_path / "pytorch_model.bin"
    byte_tokenizer().save_pretrained(tmp_path)
    save(tmp_path, {f"h.{i}.weight": torch.ones(3, i) for i in range(5)}, old=seed % 2 == 1)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    data = file.read_bytes()
    for _ in range(3):
        data = spoil_bytes(rng, data, 400)
    file.write_bytes(data)
    with pytest.raises(LlmcadError):  # it is no whole model either
        convert(tmp_path, tmp_path / "out")


def test_what_cannot_be_converted_is_refused(tmp_path: Path) -> None:
    source, original = pickled(tmp_path, shards=2)
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="dtype"):
        convert(source, out, dtype="int4")
    with pytest.raises(MemoryCapError, match=r"300\.0 MB is too small .* the least is 40\d"):
        convert(source, out, memory="300MB")
    with pytest.raises(CheckpointError, match="has safetensors weights already"):
        convert(original.path, out)
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "model.gguf").write_bytes(b"GGUF")
    for path in (tmp_path / "gguf", tmp_path / "gguf" / "model.gguf"):
        with pytest.raises(CheckpointError, match=r"model\.gguf is a GGUF file"):
            convert(path, out)
    (source / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(CheckpointError, match=r"names pytorch_model-00002-of-00002\.bin, which is absent"):
        convert(source, out)
    torch.save([torch.ones(2)], source / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds something other than named tensors"):
        convert(source, out)
    torch.save({"w": torch.ones(2, dtype=torch.int8)}, source / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"tensor w .* is stored as torch\.int8"):
        convert(source, out)
    assert not out.exists()


def test_the_old_format_needs_memory_for_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _ = pickled(tmp_path, old=True)
    monkeypatch.setattr(module, "LEAST_BLOCK_BYTES", 1)
    with pytest.raises(MemoryCapError, match=r"old format, which has to be loaded as a whole: .* give --memory \d+MB"):
        convert(source, tmp_path / "out", memory="400100000")


MEASURE = """
import sys
from pathlib import Path
from llmcad_actors.tools.convert import convert
def peak():
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(fields["VmHWM"].split()[0]) * 1024
print(peak())
convert(Path(sys.argv[1]), Path(sys.argv[2]), memory="440MB")
print(peak())
"""


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """A model of 200 MB under a cap that leaves blocks of 10 MB: mapped pages are given back too."""
    source, _ = pickled(tmp_path)
    weights = torch.load(source / "pytorch_model.bin")
    extra = {f"model.layers.{i}.mlp.unused": torch.ones(20, 1_000_000) for i in range(2, 4)}  # beyond the layer count
    save(source, weights | {name: w.clone() for name, w in extra.items()})
    command = [sys.executable, "-c", MEASURE, str(source), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    before, after = map(int, done.stdout.split())
    assert sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors")) > 160_000_000
    assert after - before < 60_000_000
    assert after < 440_000_000


def test_the_command_converts_and_says_where(tmp_path: Path) -> None:
    source, original = pickled(tmp_path)
    command = [sys.executable, "-m", "llmcad_actors.cli"]
    refused = subprocess.run([*command, "plan", "--target", str(source)], capture_output=True, text=True, timeout=60)
    assert refused.returncode == 2
    assert f"`llmcad convert {source} OUT`" in refused.stderr
    convert_it = [*command, "convert", str(source), str(tmp_path / "out"), "--memory", "1GB"]
    done = subprocess.run(convert_it, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "out")
    same_model(tmp_path / "out", original)
    with safe_open(sorted((tmp_path / "out").glob("*.safetensors"))[0], "pt") as file:
        assert file.metadata() == {"format": "pt"}
    again = subprocess.run([*command, "convert", str(tmp_path), "x"], capture_output=True, text=True, timeout=60)
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr.startswith("llmcad: ")
