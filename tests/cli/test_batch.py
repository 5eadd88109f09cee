"""`llmcad batch` on the bundled pair: a process of its own, as people run it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llmcad_actors.tools.bundled import bundled_draft, bundled_target
from tests.plain import Plain, encode

DEADLINE_S = 120.0
PROMPTS = ("import os\n", "def area(r):\n", "class Stack:\n", "for name in", "x = [", "print(")


def command(folder: Path, *more: str) -> list[str]:
    pair = "--target", str(bundled_target()), "--draft", str(bundled_draft()), "--memory", "2GB"
    files = str(folder / "in.jsonl"), "--out", str(folder / "out.jsonl")
    return [sys.executable, "-m", "llmcad_actors.cli", "batch", *files, *pair, *more]


def results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMCAD_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("environment")
def test_a_batch_goes_on_where_it_was_interrupted_and_every_text_is_the_targets(tmp_path: Path) -> None:
    path = bundled_target()
    asked = [{"prompt": prompt, "id": f"p{i}", "max_new_tokens": 8 + i} for i, prompt in enumerate(PROMPTS)]
    asked.append({"prompt": "y = 1\n" * 3000, "id": "too long"})
    asked += [{"prompt": f"# {i}\n", "id": f"long{i}", "max_new_tokens": 300} for i in range(24)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))
    with subprocess.Popen(command(tmp_path), stderr=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + DEADLINE_S
        while time.monotonic() < until and process.poll() is None:
            if (tmp_path / "out.jsonl").exists() and len(results(tmp_path)) >= 4:
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)  # SIGINT may be ignored, as by jobs of a shell
        _, told = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 143
    assert "the same command goes on from there" in told
    before = (tmp_path / "out.jsonl").read_bytes()
    done = {line["id"] for line in results(tmp_path) if "text" in line}
    assert 0 < len(done) < len(asked) - 1

    short = [line for line in asked if not str(line["id"]).startswith("long")]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in short))
    again = subprocess.run(command(tmp_path), capture_output=True, text=True, timeout=DEADLINE_S)
    assert again.returncode == 1  # a line that could not be run
    assert again.stdout == ""
    assert "are in" in again.stderr and "1 could not be run" in again.stderr
    assert (tmp_path / "out.jsonl").read_bytes().startswith(before)
    by_id = {line["id"]: line for line in results(tmp_path)}
    assert "takes at most" in by_id["too long"]["error"]
    for line in short[:-1]:
        expected = Plain.of(path).greedy(encode(path, str(line["prompt"])), int(str(line["max_new_tokens"])))
        assert tuple(by_id[line["id"]]["token_ids"]) == expected


@pytest.mark.usefixtures("environment")
def test_what_is_wrong_with_a_line_is_said_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "top_p": 7}\n')
    run = subprocess.run(command(tmp_path), capture_output=True, text=True, timeout=DEADLINE_S, env=os.environ)
    assert run.returncode == 2
    assert "in.jsonl, line 2: top_p: 7 must lie between 0 and 1" in run.stderr
    assert not (tmp_path / "out.jsonl").exists()
