"""Bad files and names, given to the commands: one paragraph that says what is wrong, exit code 2, nothing started."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from llmcad_actors.cli.commands import app
from llmcad_actors.config import EngineConfig, read_config
from llmcad_actors.errors import CheckpointError, ConfigError, UserError
from llmcad_actors.machine.cache import cache_folder
from llmcad_actors.machine.figures import Figures, figures_file, figures_for
from llmcad_actors.models.draft import DraftModel
from llmcad_actors.models.skeleton import build_skeleton
from llmcad_actors.plan.prepare import prepare
from llmcad_actors.trace.file import read_trace
from tests import encoder_decoder_cases, family_cases
from tests.fuzz_files import figures
from tests.tiny import BYTE_VOCAB, tiny_llama


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("sound"), layers=2)


@pytest.fixture
def model(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "model"))


def said_by(*words: str) -> str:
    """By the command, which must refuse."""
    result = CliRunner().invoke(app, list(words))
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 2
    assert result.stdout == ""
    assert len(result.stderr) < 1500
    return str(result.stderr)


def changed(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("~nosuchuser/model", "home directory"),
        ("a" * 5000, "File name too long"),
        ("x/" * 3000, "File name too long"),
        ("/dev/null/x", "does not exist|Not a directory"),
        ("/proc/self/fd/0/x\ny", "does not exist|Not a directory"),
    ],
)
@pytest.mark.parametrize("role", ["--target", "--draft"])
def test_a_name_that_cannot_be_a_model(name: str, what: str, role: str, sound: Path) -> None:
    words = ["plan", role, name] if role == "--target" else ["plan", "--target", str(sound), role, name]
    assert re.search(what, said_by(*words))


@contextmanager
def without_rights(folder: Path) -> Iterator[None]:
    """Nobody may look into the folder; whom permissions do not bind becomes somebody else meanwhile."""
    user, mode = os.geteuid(), folder.stat().st_mode
    folder.chmod(0)
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        folder.chmod(mode)


def test_a_folder_that_may_not_be_looked_into(model: Path) -> None:
    config = EngineConfig(target=str(model), memory="8GB")
    with without_rights(model), pytest.raises(CheckpointError, match="Permission denied"):
        prepare(config)
    with without_rights(model), pytest.raises(UserError, match=r"cannot read the trace.*Permission denied"):
        read_trace(model / "x")
    with without_rights(model), pytest.raises(ConfigError, match=r"cannot read .*Permission denied"):
        read_config(model / "x")


def test_a_loop_of_links(model: Path, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "does not exist" in said_by("plan", "--target", str(tmp_path / "loop" / "model"))
    assert "cannot read the trace" in said_by("trace", str(tmp_path / "loop" / "x"))
    assert "cannot read" in said_by("plan", "--target", str(model), "--config", str(tmp_path / "loop"))
    assert "is not a folder" in said_by("doctor", "--path", "a" * 5000)


SETTINGS: dict[str, Any] = {
    "eos_token_id": ["0", 10**30, 1.5, True, {}, [0, "1"], [[0]]],
    "repetition_penalty": [1e400, "2", -1.0],
    "no_repeat_ngram_size": [10**30, "2", True],
    "suppress_tokens": [[2**63], ["x"], 5],
    "min_length": [10**400, -1],
}
CONFIG: dict[str, Any] = {
    "bos_token_id": ["0", 10**30, True, [0]],
    "num_hidden_layers": [100_000_000, 2**31, 10**30, "2", True, 0, 3, None],
    "num_key_value_heads": [100_000_000, 10**30, [], 1.0],
    "tie_word_embeddings": ["yes", 1, []],
    "attention_bias": ["no", {}],
    "rope_scaling": ["linear", [1], 5, {"long_factor": [1.0], "original_max_position_embeddings": "x"}],
    "rope_parameters": ["linear", [1], 5],
    "max_position_embeddings": ["x", -1, 10**30],
    "model_type": [["llama"], "a" * 5000, {}, 5],
    "vocab_size": [10**9, 258, "x"],
}


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [("generation_config.json", key, value) for key, values in SETTINGS.items() for value in values]
    + [("config.json", key, value) for key, values in CONFIG.items() for value in values],
    ids=lambda value: str(value)[:20],
)
def test_a_value_that_cannot_be(file: str, key: str, value: object, model: Path) -> None:
    changed(model / file, **{key: value})
    said = said_by("plan", "--target", str(model), "--memory", "8GB")
    assert key in said or "heads of" in said or "model.layers." in said or "expected" in said or "must be" in said


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [("gemma2", "head_dim", 10**9), ("gemma2", "num_key_value_heads", 10**9), ("gpt2", "n_head", 49)],
)
def test_heads_that_no_tensor_bears_out(name: str, key: str, value: int, tmp_path: Path) -> None:
    """Of families whose layers are as they are stored: the cache would take what that number says."""
    path = family_cases.CASES[name].save(tmp_path / "model")
    prepare(EngineConfig(target=str(path), memory="8GB"))
    changed(path / "config.json", **{key: value})
    with pytest.raises(CheckpointError, match="and no tensor of a layer is that wide"):
        prepare(EngineConfig(target=str(path), memory="8GB"))


def test_ids_that_never_occur_do_no_harm(model: Path) -> None:
    changed(model / "generation_config.json", eos_token_id=[0, 5000, -1])
    changed(model / "config.json", bos_token_id=5000)
    job = prepare(EngineConfig(target=str(model), memory="8GB"))
    assert job.stop_tokens == (0, 5000, -1)
    with pytest.raises(ConfigError, match="no token to begin a text with"):
        job.opening()


@pytest.mark.parametrize("value", ["1", BYTE_VOCAB, -1, 10**30, [1], True])
def test_a_decoders_first_token_is_one_of_the_vocabulary(value: object, tmp_path: Path) -> None:
    model = encoder_decoder_cases.CASES["t5"].save(tmp_path)
    changed(model / "generation_config.json", decoder_start_token_id=value)
    with pytest.raises(CheckpointError, match="decoder_start_token_id must be a token id of the vocabulary"):
        prepare(EngineConfig(target=str(model), memory="8GB"))


@pytest.mark.parametrize("content", ["[]", "5", "{", '{"a":' * 9000, '{"tokenizer_class": []', "\ufeff{}"])
def test_settings_of_a_tokenizer_that_are_none(content: str, model: Path) -> None:
    """Known before Ray is started."""
    (model / "tokenizer_config.json").write_text(content)
    assert "tokenizer_config.json" in said_by("plan", "--target", str(model), "--memory", "8GB")


def _sparse(file: Path) -> int:
    fd = os.open(file, os.O_CREAT | os.O_WRONLY)
    os.truncate(fd, 3 * 10**9)
    return fd


ODD_FILES: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "an endless device": lambda file: file.symlink_to("/dev/zero"),
    "3 GB": lambda file: os.close(_sparse(file)),
}


@pytest.mark.parametrize("odd", ODD_FILES)
@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "model.safetensors", "tokenizer_config.json", "tokenizer.json"]
)
def test_something_else_where_a_file_should_be(odd: str, name: str, sound: Path, model: Path) -> None:
    (model / name).unlink()
    ODD_FILES[odd](model / name)
    assert "llmcad:" in said_by("plan", "--target", str(sound), "--draft", str(model), "--memory", "8GB")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("[" * 5000, "nested more than"),
        ("a: " + "{b: " * 5000, "nested more than"),
        ("x: &x [1]\n" + "".join(f"y{i}: &y{i} [{'*x, ' * 9}]\n" for i in range(9)), "do not refer to each other"),
        ("depth: " + "1" * 5000, "is not YAML: Exceeds the limit"),
        ("depth: 0x" + "f" * 5000, "a number of 20,000 bits is too large"),
        ("depth: 1.0e+400", "depth: inf must be a whole number"),
        ("depth: 1\ndepth: 2", "'depth' is set twice"),
        ("max_nodes: 99999999999999999999", "is too large"),
        ("widths: [true, 1]", "must be one or more numbers"),
        ("widths: [1, 99999999999999999999]", "must be one or more numbers"),
        ("memory: " + "9" * 300 + "GB", "memory: a number|cannot use '9"),
        ("memory: 1" + "0" * 30 + "GB", "cannot use '10"),
        ("read_limit: 1" + "0" * 30 + "GB", "cannot use '10"),
        ("target: !!python/object/apply:os.system [true]", "is not YAML: could not determine a constructor"),
        ("'" + "k" * 900 + "': 1", "unknown setting 'kkk"),
        ("threads: 2001-99-99", "is not YAML|must be a whole number"),
        ("? [a]\n: 1", "is not YAML"),
        ("# " + "x" * 70_000, "has 70,002 bytes, and such a file has at most 64,000"),
    ],
)
def test_settings_that_cannot_be(text: str, what: str, sound: Path, tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text(text)
    said = said_by("plan", "--config", str(tmp_path / "settings.yaml"), "--target", str(sound))
    assert re.search(what, said), said


def test_settings_that_can_be_are_read(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("# so\ntarget: a\ndraft: ~\nwidths: [1, 2]\n'memory': \"8GB\"\nsharpen: no\n")
    assert read_config(file) == {"target": "a", "widths": (1, 2), "memory": "8GB", "sharpen": False}
    file.write_text("{target: a, depth: 3}")
    assert read_config(file) == {"target": "a", "depth": 3}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "nosuch"),
        ("rms_norm_eps", "small"),
        ("pad_token_id", 10**6),
        ("rope_parameters", {"rope_type": "x"}),
    ],
)
def test_a_value_that_only_transformers_looks_at(key: str, value: object, model: Path) -> None:
    """What runs the target and what runs the draft say so alike."""
    changed(model / "config.json", **{key: value})
    with pytest.raises(CheckpointError, match="transformers cannot build the model of") as caught:
        build_skeleton(model, torch.float32)
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="transformers cannot build the model of"):
        DraftModel(model, dtype=torch.float32, vocab=BYTE_VOCAB, rows=16, slots=4, children=2)


SPOILT_FIGURES: dict[tuple[str, str], tuple[Any, ...]] = {
    ("disks", "bytes_per_s"): ("fast", 0, -1.0, 1e400, None, True),
    ("disks", "threads"): ("2", 0, 10**30, 1.5),
    ("disks", "rates"): ([{"x": 1}], 5),
    ("cpus", "layer_flops"): ({}, {"float32": {}}, [], {"float32": {"1": "x"}, "bfloat16": {}}),
    ("cpus", "matrix"): ([1], 5, ["a", "b"], [0, 0]),
    ("cpus", "copy_bytes_per_s"): ("x",),
}


@pytest.mark.parametrize(
    ("place", "value"), [(place, value) for place, values in SPOILT_FIGURES.items() for value in values]
)
def test_figures_that_are_none_are_no_figures(
    place: tuple[str, str], value: object, sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They can be measured again."""
    monkeypatch.setenv("LLMCAD_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    figures_file().write_text(json.dumps(figures(sound)))
    assert isinstance(figures_for(sound), Figures)
    document, (part, key) = figures(sound), place
    next(iter(document[part].values()))[key] = value
    figures_file().write_text(json.dumps(document))
    assert figures_for(sound) is None
    assert CliRunner().invoke(app, ["plan", "--target", str(sound), "--memory", "8GB"]).exit_code == 0
