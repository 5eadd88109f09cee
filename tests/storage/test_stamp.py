"""A file that is written to, cut, touched, replaced or removed is noticed; one that is read is not."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from llmcad_actors.config import EngineConfig
from llmcad_actors.errors import StorageError
from llmcad_actors.plan.prepare import prepare
from llmcad_actors.storage.checkpoint import Checkpoint
from tests.tiny import tiny_llama

HOUR_NS = 3600 * 10**9


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model"), seed=1, max_file="100KB")


def an_hour_later(file: Path) -> None:
    status = file.stat()
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + HOUR_NS))


def longer(file: Path) -> None:
    with file.open("ab") as stream:
        stream.write(b"x")
    an_hour_later(file)


def shorter(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def replaced(file: Path) -> None:
    """By an equal file of the same time, as a tool that synchronises folders may."""
    other, status = file.with_suffix(".new"), file.stat()
    other.write_bytes(file.read_bytes())
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.rename(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (an_hour_later, r"it had [\d,]+ bytes of 20.*, and has [\d,]+ bytes of 20"),
        (longer, r"it had [\d,]+ bytes of 20.*, and has [\d,]+ bytes of 20"),
        (shorter, r"it had [\d,]+ bytes of 20.*, and has [\d,]+ bytes of 20"),
        (replaced, "another file has taken its place"),
        (Path.unlink, "went away while it was in use .No such file or directory."),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_changed_file_is_named_with_what_changed(
    model: Path, tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    for file in model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    checkpoint = Checkpoint.open(tmp_path)
    assert len(checkpoint.stamps) > 2
    file = list(checkpoint.stamps)[1]
    for _ in range(2):
        file.read_bytes()
        checkpoint.check_unchanged()
    change(file)
    with pytest.raises(StorageError, match=message) as raised:
        checkpoint.check_unchanged()
    assert str(file) in str(raised.value)


def test_a_job_watches_the_files_of_its_draft_too(model: Path, tmp_path: Path) -> None:
    draft = tiny_llama(tmp_path, seed=2, layers=1)
    job = prepare(EngineConfig(target=str(model), draft=str(draft), memory="4GB"))
    job.check_unchanged()
    an_hour_later(draft / "model.safetensors")
    with pytest.raises(StorageError, match=f"{draft}/model.safetensors changed while it was in use"):
        job.check_unchanged()
