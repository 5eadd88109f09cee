"""What benchmarks run: which models and texts their options name; and the comparison with transformers' texts."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import benchmarks.reference
from benchmarks.lossless import Texts, differences
from benchmarks.real_model import NAME
from benchmarks.reference import prompt_ids, reference
from benchmarks.workload import QUESTIONS, Workload, chosen, read_prompts, read_questions
from llmcad_actors.errors import ConfigError, StorageError
from llmcad_actors.tools.bundled import bundled_draft, bundled_target
from tests.plain import Plain, encode
from tests.tiny import tiny_llama, with_template

TEMPLATE = "Question: {{ messages[0].content }}\nAnswer:"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder in which random models stand in the published one's place."""
    cache = tmp_path_factory.mktemp("cache")
    for name, dtype in (("target", torch.float32), ("draft-4bit", torch.bfloat16)):
        with_template(tiny_llama(cache / NAME / name, seed=1, context=1024, dtype=dtype), TEMPLATE)
    return cache


def run(cache: Path, benchmark: str, *options: str) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{benchmark}", *options],
        env=os.environ | {"LLMCAD_CACHE": str(cache)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_the_published_model_is_asked_questions_and_compared_with_transformers(cache: Path) -> None:
    options = ("--real", "--prompts", "3", "--tokens", "6", "--runs", "2")
    (line,) = run(cache, "lossless", *options)
    assert (line["texts"], line["tokens"], line["which"]) == (3, 18, [])
    pairs = ("tree_is_plain", "tree_is_tree_again", "plain_is_transformers", "tree_is_transformers")
    assert [line[pair] for pair in pairs] == [3, 3, 3, 3]
    config = line["config"]
    assert [config[name] for name in ("target", "draft", "chat", "runs")] == ["target", "draft-4bit", True, 2]
    assert len(list((cache / "references").iterdir())) == 3


def test_other_benchmarks_run_it_too(cache: Path) -> None:
    options = ("--real", "--prompts", "2", "--tokens", "6", "--memory", "1.5GB")
    (line,) = run(cache, "tokens_per_pass", *options)
    assert line["tokens_per_pass"] > 1
    lines = run(cache, "ablation", *options, "--only", "stdpl,ours", "--plain-tokens", "2")
    assert [line["setting"] for line in lines] == ["stdpl", "ours"]
    assert [line["texts_that_differ"] for line in lines] == [0, 0]
    assert all((each["config"]["target"], each["config"]["chat"]) == ("target", True) for each in (line, *lines))


def test_a_text_that_is_not_transformers_is_told_with_its_gap(tmp_path: Path) -> None:
    path, texts = tiny_llama(tmp_path / "target", seed=2), ["import os", "def f("]
    ids = prompt_ids(path, texts, chat=False)
    assert ids == [encode(path, text) for text in texts]
    theirs = reference(path, ids, 5, "float32")
    assert theirs == [Plain.of(path).greedy(each, 5) for each in ids]
    wrong = [theirs[0], (*theirs[1][:2], (theirs[1][2] + 1) % 256, *theirs[1][3:])]
    found = Texts(trees=[theirs, wrong], plain=theirs, theirs=theirs)
    assert list(found.counts().values()) == [1, 1, 2, 1]
    (told,) = differences(Workload(path, None, texts, False), ids, found, "float32")
    assert (told["text"], told["way"], told["at"]) == (1, "tree 2", 2)
    logits = Plain.of(path).logprobs((*ids[1], *theirs[1][:2]))
    assert told["gap"] == pytest.approx(logits[wrong[1][2]] - logits[theirs[1][2]], abs=1e-4)


def test_transformers_texts_are_kept_as_long_as_the_model_stays_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_llama(tmp_path / "target", seed=2)
    ids = prompt_ids(path, ["import os", "def f("], chat=False)
    texts = reference(path, ids, 5, "float32")
    monkeypatch.setattr(benchmarks.reference, "plain_model", {}.__getitem__)  # whoever asks it now fails
    assert reference(path, ids, 5, "float32") == texts
    for changed in ((ids, 6, "float32"), ([*ids[::-1], (1, 2)], 5, "float32"), (ids, 5, "bfloat16")):
        with pytest.raises(TypeError):
            reference(path, *changed)
    tiny_llama(path, seed=3)
    with pytest.raises(TypeError):
        reference(path, ids, 5, "float32")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMCAD_CACHE", str(tmp_path / "cache"))


def test_the_options_name_models_and_texts(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen("bundled", None, 2) == Workload(bundled_target(), bundled_draft(), read_prompts(2), False)
    assert chosen("bundled", "none", 20).draft is None
    halves = read_prompts(20)[16:]
    assert [prompt.startswith(half) for prompt, half in zip(read_prompts(4), halves, strict=True)] == [True] * 4
    monkeypatch.setenv("LLMCAD_CACHE", str(cache))
    folder = cache / NAME
    assert chosen("x", None, 4, real=True) == Workload(
        folder / "target", folder / "draft-4bit", read_questions(QUESTIONS, 4), True
    )
    assert chosen("x", "none", 4, real=True).draft is None
    assert chosen("x", "elsewhere", 4, real=True).draft == Path("elsewhere")
    with pytest.raises(ConfigError, match="--prompts"):
        chosen("bundled", None, 0)


def test_questions_are_spread_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps({"turns": [f"first {i}", "second"]}) + "\n" for i in range(480)))
    assert read_questions(file, 80) == [f"first {i}" for i in range(0, 480, 6)]
    assert read_questions(file, 7)[:3] == ["first 0", "first 68", "first 137"]
    assert len(read_questions(file, 1000)) == 480
    assert len(read_questions(QUESTIONS, 1000)) == 16
    file.write_text('{"question": "?"}\n')
    with pytest.raises(StorageError, match="JSON lines with `turns`"):
        read_questions(file, 1)
