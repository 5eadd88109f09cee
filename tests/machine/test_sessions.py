"""Session folders: private, locked while their process lives, swept when it is gone."""

import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from llmcad_actors.machine.orphans import find_orphans
from llmcad_actors.machine.sessions import LONGEST_SOCKET, SOCKET, SessionFolder, sessions_folder, sweep

HOLDER = """
import sys
from llmcad_actors.machine.sessions import SessionFolder
print(SessionFolder().path, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this process and those it starts make their sessions."""
    folder = Path(tempfile.mkdtemp(dir="/tmp", prefix="t"))
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_a_living_session_stays_and_a_killed_ones_folder_is_swept(temporary: Path) -> None:
    mine = SessionFolder()
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        theirs = Path(other.stdout.readline().strip())
        (theirs / "ray" / "sockets").mkdir(parents=True)
        assert sweep(temporary) == []
        assert not find_orphans(temporary, temporary).folders
        other.kill()
    assert find_orphans(temporary, temporary).folders == (theirs,)
    assert sweep(temporary) == [theirs]
    assert list(temporary.iterdir()) == [mine.path]
    mine.close()
    mine.close()
    assert list(temporary.iterdir()) == []
    temporary.rmdir()


def test_a_folder_that_is_being_made_is_left_alone_and_a_forgotten_one_is_not(temporary: Path) -> None:
    folder = Path(tempfile.mkdtemp(prefix="llmcad-"))
    assert sweep() == []
    os.utime(folder, (0, 0))
    (folder / "notes.txt").touch()
    assert sweep() == []  # not by us
    (folder / "notes.txt").unlink()
    assert sweep() == []
    assert folder.exists()
    folder.rmdir()
    temporary.rmdir()


def test_a_session_is_for_its_user_alone(temporary: Path) -> None:
    session = SessionFolder()
    assert stat.S_IMODE(session.path.stat().st_mode) == 0o700
    assert stat.S_IMODE((session.path / "lock").stat().st_mode) == 0o600
    session.close()
    temporary.rmdir()


def test_sockets_fit_their_limit_however_long_the_temporary_folders_name_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for length in (5, 20, 30, 90):
        monkeypatch.setattr(tempfile, "tempdir", "/tmp/" + "x" * length)
        assert len(str(sessions_folder()) + SOCKET) <= LONGEST_SOCKET
    assert sessions_folder() == Path("/tmp")
