"""Versions are read without importing anything, and a newer one than was tested is met with one line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import llmcad_actors
from llmcad_actors.machine.versions import TESTED, installed, is_tested, newer_than_tested, summary


def at(**versions: str) -> dict[str, str]:
    """The tested versions, but for these."""
    return {name: f"{tested}.0" for name, tested in TESTED.items()} | versions


@pytest.mark.parametrize(
    "versions",
    [{}, {"torch": "2.13.7+cpu"}, {"ray": "2.60.9"}, {"transformers": "5.24.0rc1"}, {"torch": "2.9.0"}, {"ray": "odd"}],
    ids=str,
)
def test_nothing_is_said_of_tested_versions_and_older_ones(versions: dict[str, str]) -> None:
    assert newer_than_tested(at(**versions).get) == ()


@pytest.mark.parametrize(
    ("name", "version"),
    [("transformers", "5.30.1"), ("transformers", "6.0.0"), ("torch", "2.100.0+cpu"), ("ray", "3.0")],
)
def test_a_newer_minor_version_is_met_with_one_line(name: str, version: str) -> None:
    (line,) = newer_than_tested(at(**{name: version}).get)
    assert f"{name} {version} is newer than {TESTED[name]}" in line
    assert f"'{name}=={TESTED[name]}.*'" in line
    assert "\n" not in line
    assert not is_tested(name, at(**{name: version}).get)


def test_several_newer_ones_share_the_line() -> None:
    (line,) = newer_than_tested(at(ray="2.61.0", torch="2.14.0").get)
    assert "ray 2.61.0" in line
    assert "torch 2.14.0" in line
    assert "transformers 5" not in line


def test_the_installed_versions_are_the_tested_ones() -> None:
    assert all(is_tested(name) for name in TESTED)
    assert installed("no-such-package-at-all") is None


def test_the_command_says_it_and_goes_on(tmp_path: Path) -> None:
    """With metadata of a newer version before the real one on the path."""
    newer = tmp_path / "transformers-5.99.1.dist-info"
    newer.mkdir()
    (newer / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 5.99.1\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "llmcad_actors.cli", "plan", "--json"],
        env=os.environ | {"PYTHONPATH": path, "LLMCAD_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("llmcad: transformers 5.99.1 is newer than 5.24, which llmcad ")


def test_the_package_knows_its_version() -> None:
    assert llmcad_actors.__version__ == installed("llmcad-actors")
    for name in TESTED:
        assert f"{name} {installed(name)}" in summary()
