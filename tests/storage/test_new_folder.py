"""A folder appears when it is complete, whoever else makes the same one, and whoever was killed while making it."""

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from llmcad_actors.storage.new_folder import appearing, is_being_made

MARK = "mark"

MAKES = """
import sys
from pathlib import Path
from llmcad_actors.storage.new_folder import appearing

with appearing(Path(sys.argv[1]), is_ours=lambda folder: (folder / "mark").exists()) as folder:
    (folder / "mark").touch()
    print(folder, flush=True)
    sys.stdin.readline()
    (folder / "made by").write_text(str(folder))
"""


def is_marked(folder: Path) -> bool:
    return (folder / MARK).exists()


def start(place: Path) -> tuple["subprocess.Popen[str]", Path]:
    """A process that makes the folder, in the middle of it."""
    process = subprocess.Popen(
        [sys.executable, "-c", MAKES, str(place)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def finish(process: "subprocess.Popen[str]") -> int:
    process.communicate("\n", timeout=60)
    return process.returncode


def test_it_appears_when_it_is_complete_and_as_readable_as_any(tmp_path: Path) -> None:
    place = tmp_path / "new" / "place"
    with appearing(place, is_ours=is_marked) as folder:
        (folder / "file").write_text("text")
        assert not place.exists()
        assert is_being_made(folder)
    (tmp_path / "plain").mkdir()
    assert (place / "file").read_text() == "text"
    assert stat.S_IMODE(place.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    assert list(place.parent.iterdir()) == [place]


def test_those_who_make_the_same_at_once_all_end_well(tmp_path: Path) -> None:
    place = tmp_path / "place"
    makers = [start(place) for _ in range(3)]
    folders = {folder for _, folder in makers}
    assert len(folders) == 3
    assert all(is_being_made(folder) and is_marked(folder) for folder in folders)  # a later one removes no earlier one
    assert [finish(process) for process, _ in makers] == [0, 0, 0]
    assert list(tmp_path.iterdir()) == [place]
    assert (place / "made by").read_text() == str(makers[0][1])


def test_what_a_killed_one_left_is_removed_and_what_is_not_ours_stays(tmp_path: Path) -> None:
    place = tmp_path / "place"
    killed, left = start(place)
    living, written = start(place)
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=60)
    foreign = [tmp_path / name for name in ("place.00000000.partial", "place.doc.partial", "places.0123abcd.partial")]
    for folder in foreign:
        folder.mkdir()
    (foreign[1] / MARK).touch()
    (foreign[2] / MARK).touch()
    assert not is_being_made(left)
    with appearing(place, is_ours=is_marked):
        assert not left.exists()
        assert is_marked(written)
    assert finish(living) == 0
    assert sorted(tmp_path.iterdir()) == sorted([place, *foreign])


@pytest.mark.parametrize("goes_on", [True, False])
def test_what_broke_off_is_gone_on_with_where_that_is_wanted(tmp_path: Path, goes_on: bool) -> None:
    place, may_go_on = tmp_path / "place", is_marked if goes_on else None
    with pytest.raises(KeyboardInterrupt), appearing(place, is_ours=is_marked, may_go_on=may_go_on) as folder:
        (folder / MARK).touch()
        raise KeyboardInterrupt
    assert folder.exists() == goes_on
    with appearing(place, is_ours=is_marked, may_go_on=may_go_on) as again:
        assert (again == folder) == goes_on
    assert list(tmp_path.iterdir()) == [place]


def test_what_is_no_folder_is_in_the_way(tmp_path: Path) -> None:
    place = tmp_path / "place"
    with pytest.raises(OSError, match="place"), appearing(place, is_ours=is_marked):
        place.write_text("a file")
    assert [os.path.basename(path) for path in tmp_path.iterdir()] == ["place"]
