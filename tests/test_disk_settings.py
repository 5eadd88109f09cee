"""A disk is read as it was found to be fastest; it is measured once, where that is worth it."""

from pathlib import Path

import pytest

from llmcad_actors import disk_settings
from llmcad_actors.config import EngineConfig
from llmcad_actors.disk_settings import CHUNK_BYTES, READ_THREADS, meet_disk, read_settings
from llmcad_actors.doctor_figures import DiskFigures, disk_figures_for, figures_file, keep
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
    keep(target.path, DiskFigures(1e9, 3, 16 * MIB, True), None)
    assert read_settings(config, target) == (3, 16 * MIB)
    asked = EngineConfig(target=str(target.path), read_threads=5, chunk_bytes=MIB)
    assert read_settings(asked, target) == (5, MIB)


def test_a_disk_is_measured_once(target: Checkpoint) -> None:
    said: list[str] = []
    config = EngineConfig(target=str(target.path))
    meet_disk(config, target, said.append)
    found = disk_figures_for(target.path)
    assert found is not None and found.bytes_per_s > 0
    assert read_settings(config, target) == (found.threads, found.chunk_bytes)
    written = figures_file().stat().st_mtime_ns
    meet_disk(config, target, said.append)
    assert (len(said), figures_file().stat().st_mtime_ns) == (1, written)


@pytest.mark.parametrize("settings", [{"read_limit": "10MB/s"}, {"read_threads": 1, "chunk_bytes": MIB}], ids=str)
def test_it_is_left_alone_where_there_is_nothing_to_find_out(target: Checkpoint, settings: dict[str, object]) -> None:
    meet_disk(EngineConfig(target=str(target.path), **settings), target, pytest.fail)  # type: ignore[arg-type]
    assert disk_figures_for(target.path) is None


def test_a_small_checkpoint_is_not_worth_it(target: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_settings, "LEAST_BYTES", target.total_bytes + 1)
    meet_disk(EngineConfig(target=str(target.path)), target, pytest.fail)


def test_a_cache_that_cannot_be_written_stops_nobody(target: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMCAD_CACHE", "/proc/no/such/folder")
    said: list[str] = []
    meet_disk(EngineConfig(target=str(target.path)), target, said.append)
    assert said == ["measuring the disk, this once"]
