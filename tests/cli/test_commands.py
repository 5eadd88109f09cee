"""The command line: bad input is one paragraph and exit code 2, before any process starts; JSON is JSON."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from typer.testing import CliRunner

from llmcad_actors.cli.options import takes_job
from llmcad_actors.config import EngineConfig
from llmcad_actors.core.stats import Stats
from llmcad_actors.plan.job import Prepared
from llmcad_actors.plan.prediction import forecast
from llmcad_actors.plan.prepare import prepare
from llmcad_actors.storage.checkpoint import Checkpoint
from llmcad_actors.tools.bundled import bundled_draft, bundled_target
from llmcad_actors.tools.enlarge import enlarge, sketch
from tests.tiny import byte_tokenizer, tiny_llama

RECORDER = """
import os, sys

def record(event, args):
    if event in ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.exec", "os.system"):
        with open(os.environ["STARTED_PROCESSES"], "a") as file:
            file.write(f"{event} {args}\\n")

sys.addaudithook(record)
"""
DEMO_BYTES_MADE = 2_541_981_696
PAIR = ("--target", str(bundled_target()), "--draft", str(bundled_draft()))


class Llmcad:
    """The command, in a process that notes every process it starts."""

    def __init__(self, folder: Path) -> None:
        (folder / "sitecustomize.py").write_text(RECORDER)
        self._folder = folder
        self.started = folder / "started"

    def __call__(self, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        environment = {
            "PYTHONPATH": str(self._folder),
            "STARTED_PROCESSES": str(self.started),
            "LLMCAD_CACHE": str(self._folder / "cache"),
            "COLUMNS": "100",
        }
        return subprocess.run(
            [sys.executable, "-m", "llmcad_actors.cli", *arguments],
            env=os.environ | environment,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=280,
        )


@pytest.fixture
def llmcad(tmp_path: Path) -> Llmcad:
    folder = tmp_path / "llmcad"
    folder.mkdir()
    return Llmcad(folder)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with nothing wrong."""
    return tiny_llama(tmp_path_factory.mktemp("sound"), layers=2)


@pytest.fixture
def model(sound: Path, tmp_path: Path) -> Path:
    """A copy of it, to be spoilt."""
    return Path(shutil.copytree(sound, tmp_path / "model"))


def truncated(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def without_a_tensor(model: Path) -> None:
    change(model, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))


def with_a_wrong_shape(model: Path) -> None:
    change(model, lambda weights: weights.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(3, 48)}))


def with_a_final_norm_of_another_model(model: Path) -> None:
    change(model, lambda weights: weights.update({"model.norm.weight": torch.zeros(3)}))


def change(model: Path, what: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(model / "model.safetensors")
    what(weights)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def pickled(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def without_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def of_an_unknown_architecture(model: Path) -> None:
    edit(model / "config.json", '"model_type": "llama"', '"model_type": "mamba"')


def without_a_first_token(model: Path) -> None:
    edit(model / "config.json", '"bos_token_id": 0', '"bos_token_id": null')


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def other_tokenizer(model: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("<|more|>")])
    tokenizer.save_pretrained(model)


BAD_MODELS: dict[Callable[[Path], None], str] = {
    truncated: r"model\.safetensors.*(truncated|ends|bytes)",
    without_a_tensor: r"missing tensor model\.layers\.1\.mlp\.up_proj\.weight in .*model",
    with_a_wrong_shape: r"tensor model\.layers\.0\.mlp\.up_proj\.weight in .*: found F32 \[3, 48\], expected F32 \[104",
    with_a_final_norm_of_another_model: r"tensor model\.norm\.weight in .*: found F32 \[3\], expected F32 \[48\]",
    pickled: r"holds only pickle weights \(pytorch_model\.bin\)",
    without_weights: "has a config.json but no weights",
    of_an_unknown_architecture: "model_type 'mamba', which llmcad does not know; known architectures: .*llama",
    shutil.rmtree: "does not exist",
}


def assert_refused(done: subprocess.CompletedProcess[str], message: str, started: Path) -> None:
    """One paragraph on standard error that says so, exit code 2, no process started."""
    assert done.returncode == 2, done.stderr
    assert re.search(message, done.stderr), done.stderr
    assert done.stderr.startswith("llmcad: ")
    assert "\n\n" not in done.stderr.strip()
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not started.exists(), started.read_text()


@pytest.mark.parametrize("spoil", BAD_MODELS, ids=lambda spoil: spoil.__name__)
def test_a_bad_checkpoint_is_refused_before_anything_starts(
    llmcad: Llmcad, model: Path, spoil: Callable[[Path], None]
) -> None:
    spoil(model)
    assert_refused(llmcad("generate", "--target", str(model), "x"), BAD_MODELS[spoil], llmcad.started)


@pytest.mark.parametrize(
    ("words", "name"),
    [(("generate", "--target"), "gguf/m.gguf"), (("plan", "--target"), "gguf"), (("convert",), "gguf/m.gguf")],
    ids=str,
)
def test_gguf_is_refused_with_what_to_use_instead(
    llmcad: Llmcad, tmp_path: Path, words: tuple[str, ...], name: str
) -> None:
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "m.gguf").write_bytes(b"GGUF")
    more = {"generate": ["x"], "plan": [], "convert": [str(tmp_path / "out")]}[words[0]]
    done = llmcad(*words, str(tmp_path / name), *more)
    assert_refused(done, r"(?s)m\.gguf.*GGUF file|GGUF file.*m\.gguf", llmcad.started)
    assert re.search(r"original\s+Hugging\s+Face", done.stderr)


def test_a_bad_draft_is_refused_as_a_bad_target_is(llmcad: Llmcad, sound: Path, model: Path) -> None:
    truncated(model)
    done = llmcad("plan", "--target", str(sound), "--draft", str(model))
    assert_refused(done, str(model / "model.safetensors"), llmcad.started)


def test_tokenizers_that_differ_are_refused_with_the_first_difference(llmcad: Llmcad, sound: Path, model: Path) -> None:
    other_tokenizer(model)
    done = llmcad("generate", "--target", str(sound), "--draft", str(model), "x")
    message = r"do not share a tokenizer: the first difference is at id 257, no token in the target and '<\|more\|>' in"
    assert_refused(done, message, llmcad.started)


def test_a_cap_too_small_is_refused_with_the_smallest_that_works(llmcad: Llmcad, sound: Path) -> None:
    done = llmcad("generate", "--target", str(sound), "--memory", "100MB", "x")
    assert_refused(done, r"a memory cap of 100\.0 MB is too small; the least that works is \d+MB", llmcad.started)
    found = re.search(r"Try --memory (\w+)", done.stderr)
    assert found
    assert llmcad("plan", "--target", str(sound), "--memory", found[1]).returncode == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--memory", "lots"), "cannot use 'lots' as a memory size"),
        (("--memory", "1.5"), "cannot use '1.5' as a memory size: the unit is missing; write 1.5GB, "),
        (("--read-limit", "400"), "cannot use '400' as a rate: the unit is missing; write 400GB, "),
        (("--dtype", "int4"), "dtype: 'int4' is not known; choose one of auto, float32, bfloat16"),
        (("--max-context", "100000"), "max_context: 100000 is more than the target's context of 512 tokens"),
        (("--max-nodes", "0"), "max_nodes: 0 must be a whole number of at least 1"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_an_option_that_cannot_be_is_refused(
    llmcad: Llmcad, sound: Path, options: tuple[str, str], message: str
) -> None:
    assert_refused(llmcad("generate", "--target", str(sound), *options, "x"), message, llmcad.started)


def test_an_unknown_option_is_refused(llmcad: Llmcad) -> None:
    done = llmcad("generate", "--bogus", "x")
    assert done.returncode == 2
    assert "No such option: --bogus" in done.stderr
    assert "Traceback" not in done.stderr
    assert not llmcad.started.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read .*settings.yaml: No such file"),
        (b"memory: [", "settings.yaml is not YAML"),
        (b"\xff\xfe\xfa", "settings.yaml is not YAML"),
        (b"just words", "expected `setting: value` lines"),
        (b"memry: 4GB", "unknown setting 'memry'; known: alpha, .*batch, .*memory"),
        (b"memory: 4.5", r"memory: 4\.5 must be text, such as '1.5GB', or a whole number of bytes"),
        (b"alpha: high", "alpha: 'high' must be a number"),
        (b"widths: 3", "widths: 3 must be a list of numbers"),
    ],
    ids=str,
)
def test_an_unreadable_configuration_file_is_refused(
    llmcad: Llmcad, sound: Path, tmp_path: Path, content: bytes | None, message: str
) -> None:
    file = tmp_path / "settings.yaml"
    if content is not None:
        file.write_bytes(content)
    assert_refused(llmcad("plan", "--target", str(sound), "--config", str(file)), message, llmcad.started)


def test_an_empty_prompt_is_refused_where_no_token_begins_a_text(llmcad: Llmcad, model: Path) -> None:
    without_a_first_token(model)
    for arguments in (("",), ()):
        done = llmcad("generate", "--target", str(model), "--memory", "4GB", *arguments)
        assert_refused(done, "the prompt is empty", llmcad.started)


def test_a_plan_starts_nothing_and_says_where_the_memory_goes(llmcad: Llmcad) -> None:
    as_json = llmcad("plan", *PAIR, "--memory", "1.4GB", "--json")
    assert (as_json.returncode, as_json.stderr) == (0, "")
    plan = json.loads(as_json.stdout)
    assert sum(plan["parts"].values()) == plan["total_bytes"] <= plan["memory_cap_bytes"] == 1_400_000_000
    assert plan["pinned"] or plan["streamed"]
    table = llmcad("plan", *PAIR, "--memory", "1.4GB")
    assert table.returncode == 0
    for word in ("memory cap", "1.40 GB", "pinned", "read from disk in a pass", "seconds per pass"):
        assert word in table.stdout
    assert not llmcad.started.exists(), llmcad.started.read_text()


def test_padded_vocabularies_of_different_size_may_work_together(llmcad: Llmcad, sound: Path, tmp_path: Path) -> None:
    draft = tiny_llama(tmp_path / "draft", layers=1, vocab=320)
    assert llmcad("plan", "--target", str(sound), "--draft", str(draft)).returncode == 0


def test_options_win_over_the_configuration_file(llmcad: Llmcad, sound: Path, tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(f"target: {sound}\nmemory: 2GB\nmax_context: 100\n")
    of_file = json.loads(llmcad("plan", "--target", str(sound), "--config", str(file), "--json").stdout)
    assert of_file["memory_cap_bytes"] == 2_000_000_000
    options = ("--target", str(sound), "--config", str(file), "--memory", "3GB", "--json")
    assert json.loads(llmcad("plan", *options).stdout)["memory_cap_bytes"] == 3_000_000_000


def test_the_targets_of_options_win_over_the_files_and_the_file_over_the_default(
    llmcad: Llmcad, sound: Path, model: Path, tmp_path: Path
) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(f"target: {sound}\ndraft: {sound}\nmemory: 2GB\n")

    def planned(*options: str) -> dict[str, object]:
        done = llmcad("plan", "--config", str(file), "--json", *options)
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))

    of_file, of_demo = planned(), planned("--target", "demo", "--draft", str(bundled_draft()))
    assert of_file["target_bytes"] == Checkpoint.open(sound).total_bytes
    assert planned("--target", str(model)) == of_file  # a copy
    assert of_demo["target_bytes"] == DEMO_BYTES_MADE
    assert planned("--draft", "none")["parts"]["draft weights"] == 0  # type: ignore[index]
    file.write_text("max_context: 99\n")
    assert planned()["target_bytes"] == DEMO_BYTES_MADE


def test_a_plan_of_the_demo_writes_no_weights(llmcad: Llmcad, tmp_path: Path) -> None:
    cache = tmp_path / "llmcad" / "cache"
    as_json = llmcad("plan", "--json")
    assert (as_json.returncode, as_json.stderr) == (0, "")
    plan = json.loads(as_json.stdout)
    assert (plan["target_bytes"], plan["memory_cap_bytes"]) == (DEMO_BYTES_MADE, 1_500_000_000)
    assert "demo-2500000000: 2.54 GB of weights" in llmcad("plan").stdout
    assert not cache.exists()
    assert not list(tmp_path.rglob("llmcad-sketch-*"))


def test_a_sketch_is_planned_as_the_model_itself(tmp_path: Path) -> None:
    real = enlarge(bundled_target(), tmp_path / "real", target_bytes=80_000_000)
    holes = sketch(bundled_target(), tmp_path / "sketch", target_bytes=80_000_000)
    found, made = (Checkpoint.open(path) for path in (holes, real))
    places = [{name: (i.dtype, i.shape, i.file.name, i.offset) for name, i in c.tensors.items()} for c in (found, made)]
    assert places[0] == places[1]
    assert found.config == made.config
    assert sum(file.stat().st_blocks * 512 for file in holes.glob("*.safetensors")) < 1_000_000
    forecasts = [forecast(prepare(EngineConfig(target=str(path), memory="1.3GB"))) for path in (holes, real)]
    assert forecasts[0] == forecasts[1]


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("foo", "cannot use 'foo' as the demo's --size: write for example 2.5GB"),
        ("50%", "cannot use '50%' as the demo's --size"),
        ("1.5", "cannot use '1.5' as the demo's --size: the unit is missing; write 1.5GB"),
        ("1KB", "the smallest enlargement has"),
        ("900000GB", "bytes free, the enlarged model needs .* LLMCAD_CACHE names another one"),
    ],
)
def test_a_size_of_the_demo_that_cannot_be_is_refused(llmcad: Llmcad, size: str, message: str) -> None:
    done = llmcad("demo", "--size", size)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.search(message, done.stderr.splitlines()[-1])
    assert not llmcad.started.exists()


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        (("--no-sharpen",), {"sharpen": False}),
        (("--no-provisional",), {"provisional": False}),
        (("--sharpen", "--provisional"), {"sharpen": True, "provisional": True}),
        (("--builder", "pacer", "--fallback", "adaptive"), {"builder": "pacer", "fallback": "adaptive"}),
        (("--alpha", "0.2", "--alpha-update", "average"), {"alpha": 0.2, "alpha_update": "average"}),
        (("--fallback", "fixed-depth", "--depth", "3"), {"fallback": "fixed-depth", "depth": 3}),
        (("--fallback", "fixed-tree", "--widths", "1,2"), {"fallback": "fixed-tree", "widths": (1, 2)}),
        (("--fallback", "token-confidence", "--threshold", "0.7"), {"fallback": "token-confidence", "threshold": 0.7}),
        (("--max-nodes", "9", "--max-context", "99"), {"max_nodes": 9, "max_context": 99}),
        (("--dtype", "float32"), {"dtype": "float32"}),
        (("--plain-ray",), {"plain_ray": True}),
        (("--threads", "3", "--draft-threads", "2"), {"threads": 3, "draft_threads": 2}),
        (("--read-limit", "40MB/s", "--memory", "2GB"), {"read_limit": "40MB/s", "memory": "2GB"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_options_are_settings_of_the_engine(
    sound: Path, options: tuple[str, ...], settings: Mapping[str, object]
) -> None:
    jobs: list[Prepared] = []
    app = typer.Typer()
    app.command()(takes_job(lambda job: jobs.append(job)))
    done = CliRunner().invoke(app, ["--target", str(sound), "--draft", str(sound), *options])
    assert done.exit_code == 0, done.output
    assert {name: getattr(jobs[0].config, name) for name in settings} == settings


def test_json_is_one_object_with_every_figure(llmcad: Llmcad) -> None:
    """The pair in bfloat16, as it is stored."""
    done = llmcad(
        "generate", *PAIR, "--memory", "1.4GB", "--max-new-tokens", "20", "--json", "-", stdin="class Stack:\n    def "
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    report = json.loads(line)
    assert report.keys() == {"text", "token_ids", "finish_reason", "stats", "target_path", "draft_path"}
    assert report["stats"].keys() == {field.name for field in dataclasses.fields(Stats)}
    assert (report["target_path"], report["draft_path"]) == (str(bundled_target()), str(bundled_draft()))
    assert len(report["token_ids"]) == report["stats"]["new_tokens"] == 20
    assert report["text"].strip()
    assert report["finish_reason"] == "length"
    assert report["stats"]["tokens_per_pass"] > 1
    assert 0 < report["stats"]["peak_memory_bytes"] <= report["stats"]["memory_cap_bytes"]
    assert "Traceback" not in done.stderr
    assert "raylet" in llmcad.started.read_text()  # so a process that is started is noticed


def test_the_demo_compares_speculation_with_plain_decoding(llmcad: Llmcad) -> None:
    options = ("--size", "80MB", "--memory", "1.3GB", "--max-new-tokens", "12", "--plain-tokens", "2", "--json")
    done = llmcad("demo", *options)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["target_bytes"] >= 80_000_000
    assert Path(report["target_path"]).parent.name == "cache"
    assert f"the demo's target is made once: 80.0 MB in {report['target_path']} (`llmcad clean` " in done.stderr
    assert report["seconds_per_token"] > 0
    assert report["plain_seconds_per_token"] > 0
    assert report["times_faster"] == report["plain_seconds_per_token"] / report["seconds_per_token"]
    assert report["same_text"] is True
    assert report["stats"]["spilled_bytes"] == 0
