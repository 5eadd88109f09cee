"""A model's name stands for its directory in the local Hugging Face cache; nothing is downloaded."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llmcad_actors.errors import CheckpointError
from llmcad_actors.storage.checkpoint import Checkpoint
from llmcad_actors.storage.model_names import find_model
from tests.tiny import tiny_llama

NAME, COMMIT = "some-lab/Tiny-1.0_b", "5e0c1a4ad0f6c4d4a4c9be0f0a1b2c3d4e5f6071"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model"), layers=1, max_file="40KB")


@pytest.fixture
def cache(model: Path, tmp_path: Path) -> Path:
    """A cache that holds the model, as huggingface_hub lays it out."""
    fill(tmp_path / "hub", model)
    return tmp_path / "hub"


def fill(cache: Path, model: Path, name: str = NAME, commit: str = COMMIT) -> None:
    folder = cache / f"models--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    for path in (folder / "blobs", folder / "refs", snapshot):
        path.mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text(commit)
    for number, file in enumerate(sorted(model.iterdir())):
        shutil.copy(file, folder / "blobs" / f"{number:040d}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040d}")


def test_the_fake_cache_is_laid_out_as_the_library_expects(cache: Path) -> None:
    from huggingface_hub import snapshot_download

    assert find_model(NAME, cache) == Path(snapshot_download(NAME, cache_dir=cache, local_files_only=True))


@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HF_HOME"])
def test_target_and_draft_may_be_names(cache: Path, model: Path, tmp_path: Path, variable: str) -> None:
    fill(cache, model, "tiny")
    place = {"HF_HUB_CACHE": str(cache)} if variable == "HF_HUB_CACHE" else {"HF_HOME": str(tmp_path)}
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE_"))} | place
    command = [sys.executable, "-m", "llmcad_actors.cli", "plan", "--target", NAME, "--draft", "tiny", "--json"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["target_bytes"] > 0


def test_looking_names_up_keeps_the_callers_process_thin(cache: Path) -> None:
    script = (
        "import sys, pathlib; from llmcad_actors.storage.model_names import find_model, hub_cache; hub_cache(); "
        "find_model(sys.argv[1], pathlib.Path(sys.argv[2])); "
        "print({'torch', 'transformers', 'httpx', 'httpx2', 'requests'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", script, NAME, str(cache)]
    assert subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout == "set()\n"


def test_a_directory_wins_over_a_name(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_model(NAME, cache) == cache / "models--some-lab--Tiny-1.0_b" / "snapshots" / COMMIT
    (tmp_path / NAME).mkdir(parents=True)
    assert find_model(NAME, cache) == Path(NAME)


@pytest.mark.parametrize("path", ["./model", "/model", "some/lab/model", "../model", "some-lab/"])
def test_what_cannot_be_a_name_is_a_path(cache: Path, path: str) -> None:
    assert find_model(path, cache) == Path(path)


def test_a_name_that_is_not_there_is_refused_with_how_to_fetch_it(cache: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        find_model("other-lab/Tiny", cache)
    assert str(cache) in str(caught.value)
    assert "`hf download other-lab/Tiny`" in str(caught.value)


def test_of_several_snapshots_main_counts(cache: Path, model: Path) -> None:
    fill(cache, model, commit="0" * 40)
    assert find_model(NAME, cache).name == "0" * 40
    refs = cache / "models--some-lab--Tiny-1.0_b" / "refs"
    shutil.rmtree(refs)
    with pytest.raises(CheckpointError, match="a snapshot is missing"):
        find_model(NAME, cache)
    shutil.rmtree(refs.parent / "snapshots" / ("0" * 40))
    assert find_model(NAME, cache).name == COMMIT


def test_a_snapshot_that_is_not_whole_is_refused_with_what_is_missing(cache: Path, model: Path) -> None:
    snapshot = find_model(NAME, cache)
    shards = sorted(file.name for file in model.glob("*.safetensors"))
    assert len(shards) > 2
    (snapshot / shards[1]).resolve().rename(snapshot.parents[1] / "blobs" / "abc.incomplete")
    with pytest.raises(CheckpointError) as caught:
        find_model(NAME, cache)
    assert f"only in part: {shards[1]} is missing (1 interrupted download); complete it with" in str(caught.value)
    (snapshot / "config.json").unlink()
    (snapshot / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json, model\.safetensors are missing"):
        find_model(NAME, cache)


def test_a_snapshot_of_gguf_files_is_refused_as_such(cache: Path) -> None:
    snapshot = find_model(NAME, cache)
    for file in snapshot.iterdir():
        file.unlink()
    (snapshot / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"a GGUF file \(m\.gguf\), which llmcad does not read"):
        Checkpoint.open(find_model(NAME, cache))


def test_a_snapshot_of_pickles_is_for_opening_to_refuse(cache: Path) -> None:
    snapshot = find_model(NAME, cache)
    (snapshot / "model.safetensors.index.json").unlink()
    (snapshot / "pytorch_model.bin").write_bytes(b"x")
    assert find_model(NAME, cache) == snapshot
