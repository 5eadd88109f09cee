"""The streaming benchmark runs what it is told to run, and draws it."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.streaming import bench, combinations, draw, labels
from llmcad_actors.tools.bundled import bundled_target
from tests.actors.engines import job


def test_every_combination_is_run_once() -> None:
    found = combinations(target="demo", read_threads="1,4", read_limit="none,400MB/s")
    assert found == [
        {"target": "demo", "read_threads": threads, "read_limit": limit}
        for threads in ("1", "4")
        for limit in (None, "400MB/s")
    ]
    assert labels(found)[1] == "read_threads 1\nread_limit 400MB/s"
    assert labels(found[:1]) == [""]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--threads", "1,two"], "--threads: 'two' is not a number"), (["--extent", "1XB"], "1XB")],
)
def test_a_wrong_option_is_said_in_a_line(arguments: list[str], said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.streaming", "--target", "bundled", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert said in done.stderr and "Traceback" not in done.stderr


def test_both_rates_are_measured_and_drawn(tmp_path: Path) -> None:
    cap = job(bundled_target(), None, extra_bytes=0).memory.cap_bytes
    settings = {"target": "bundled", "memory": str(cap), "extent_bytes": 1 << 20, "read_limit": "200MB/s"}
    runs, line = bench(settings, runs=1, passes=2)
    assert runs[0].raw > 0 and runs[0].llmcad > 0
    assert line["ratio"]["median"] == runs[0].ratio
    assert line["config"]["read_threads"] > 0  # what was chosen, where nothing was asked for
    draw(["bundled"], [runs], tmp_path / "rates.png")
    assert (tmp_path / "rates.png").stat().st_size > 5000
