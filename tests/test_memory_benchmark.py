"""The sweep over caps runs, keeps each cap, and tells a killed run from a sound one."""

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from benchmarks.cgroups import memory_cgroup
from benchmarks.memory import default_caps, parse_count
from benchmarks.vocabularies import pair
from llmcad_actors.config import EngineConfig
from llmcad_actors.machine.limits import memory_limit
from llmcad_actors.plan.footprint import DAEMONS
from llmcad_actors.plan.prepare import prepare
from llmcad_actors.text.tokenizer import read_tokenizer
from llmcad_actors.tools.bundled import bundled_draft, bundled_target
from tests.actors.engines import job

MIB = 1 << 20


def test_a_process_beyond_a_hard_cap_is_killed_and_counted() -> None:
    if psutil.swap_memory().total:
        pytest.skip("with swap the kernel may page it out instead")
    try:
        with memory_cgroup(64 * MIB) as cgroup:
            done = subprocess.run(cgroup.command([sys.executable, "-c", f"b'x' * {300 * MIB}"]), timeout=60)
            kills, peak = cgroup.oom_kills(), cgroup.peak_bytes()
            folder = cgroup.folder
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here: {error}")
    assert done.returncode == -9
    assert kills == 1
    assert peak is None or peak <= 64 * MIB
    assert not folder.exists()


def test_the_default_caps_run_from_the_least_to_all_pinned() -> None:
    caps = default_caps(EngineConfig(target=str(bundled_target()), draft=str(bundled_draft())))
    assert caps == sorted(set(caps))
    assert caps[-1] <= memory_limit().limit_bytes
    least = job(bundled_target(), bundled_draft(), overlaps=False).memory.cap_bytes
    assert least <= caps[0] < least + 10**6


def test_models_with_a_vocabulary_of_any_size_are_made_once(tmp_path: Path) -> None:
    target, draft = pair("bpe", parse_count("2k"), tmp_path)
    job = prepare(EngineConfig(target=str(target), draft=str(draft), memory="4GB"))
    assert read_tokenizer(target).get_vocab_size() == job.layout.embedding.shape[0] == 2000
    made = (target / "tokenizer.json").stat().st_mtime_ns
    assert pair("bpe", 2000, tmp_path) == (target, draft)
    assert (target / "tokenizer.json").stat().st_mtime_ns == made


def test_a_sweep_prints_a_line_for_every_cap() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", "--target", "bundled", "--caps", "100MB,1.4GB", "--tokens", "6"],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    refused, sound = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    assert "a memory cap of 100.0 MB is too small" in refused["refused"]
    assert 0 < sound["peak_bytes"] <= sound["memory_cap_bytes"] == 1_400_000_000
    assert sum(sound["peak_by_group"].values()) == sound["peak_bytes"]
    groups = sound["peak_by_group"]
    assert groups.keys() == {"driver", "coordinator", "draft", "verifier", "loader", "Ray daemons", "store"}
    if missing := [name for name, taken in groups.items() if not taken]:  # one is a daemon until it has its name
        assert missing in (["coordinator"], ["draft"], ["verifier"], ["loader"]), groups
        assert groups["Ray daemons"] > 1.5 * DAEMONS
    assert 0 < sound["overhead_bytes"] < sound["peak_bytes"]
    assert sound["spilled_bytes"] == 0
    assert (sound["same_output"], sound["killed"]) == (True, False)
    assert "at the peak, MB" in done.stdout
