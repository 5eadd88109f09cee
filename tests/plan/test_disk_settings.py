"""A disk is read as `llmcad doctor` found it to be fastest; where it has not looked, a start says so."""

from pathlib import Path

import pytest

from llmcad_actors import Engine
from llmcad_actors.config import EngineConfig
from llmcad_actors.machine.figures import DiskFigures, disk_figures_for, remember
from llmcad_actors.plan import disk_settings
from llmcad_actors.plan.disk_settings import CHUNK_BYTES, READ_THREADS, read_settings, unmeasured
from llmcad_actors.storage.checkpoint import Checkpoint
from tests.tiny import tiny_llama

MIB = 1 << 20


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    monkeypatch.setenv("LLMCAD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(disk_settings, "LEAST_BYTES", 1)
    return Checkpoint.open(tiny_llama(tmp_path / "model"))


def test_the_settings_win_over_what_was_measured_and_that_over_defaults(target: Checkpoint) -> None:
    config = EngineConfig(target=str(target.path))
    assert read_settings(config, target) == (READ_THREADS, CHUNK_BYTES)
    remember(target.path, DiskFigures(1e9, 3, 16 * MIB, True), None)
    assert read_settings(config, target) == (3, 16 * MIB)
    asked = EngineConfig(target=str(target.path), read_threads=5, chunk_bytes=MIB)
    assert read_settings(asked, target) == (5, MIB)


def test_a_disk_that_nobody_measured_is_told_of_and_left_alone(target: Checkpoint) -> None:
    config = EngineConfig(target=str(target.path), memory="2GB", max_context=64)
    (notice,) = unmeasured(config, target)
    assert "llmcad doctor" in notice
    said: list[str] = []
    with Engine.launch(target.path, "none", memory="2GB", max_context=64, say=said.append):
        assert notice in said
    assert disk_figures_for(target.path) is None
    remember(target.path, DiskFigures(1e9, 3, 16 * MIB, True), None)
    assert unmeasured(config, target) == ()


@pytest.mark.parametrize("settings", [{"read_limit": "10MB/s"}, {"read_threads": 1, "chunk_bytes": MIB}], ids=str)
def test_nothing_is_said_where_there_is_nothing_to_find_out(target: Checkpoint, settings: dict[str, object]) -> None:
    assert unmeasured(EngineConfig(target=str(target.path), **settings), target) == ()  # type: ignore[arg-type]


def test_a_small_checkpoint_is_not_worth_a_word(target: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_settings, "LEAST_BYTES", target.total_bytes + 1)
    assert unmeasured(EngineConfig(target=str(target.path)), target) == ()
