"""What the caches hold is listed; what llmcad made and can make again is removed on request, and nothing else."""

import json
import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from llmcad_actors.cli.commands import app
from llmcad_actors.machine.cache import cache_folder
from llmcad_actors.machine.orphans import Orphans
from llmcad_actors.storage.model_names import find_model
from llmcad_actors.tools import caches
from llmcad_actors.tools.bundled import bundled_target
from llmcad_actors.tools.caches import held_models, leftovers, remove, size_on_disk
from llmcad_actors.tools.enlarge import enlarge
from tests.tiny import tiny_llama

DEMO_SIZE = 6_000_000
Folders = tuple[Path, Path]


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folders:
    """llmcad's cache with an enlarged model and figures, and a temporary folder; the Hugging Face cache beside them."""
    cache, temporary = tmp_path / "cache", tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("LLMCAD_CACHE", str(cache))
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(caches, "is_a_session_running", lambda: False)  # other tests' may be
    enlarge(tiny_llama(tmp_path / "small", layers=1), cache / f"demo-{DEMO_SIZE}", target_bytes=DEMO_SIZE)
    shutil.rmtree(tmp_path / "small")
    (cache / "doctor.json").write_text("{}")
    return cache, temporary


def in_hub(hub: Path, name: str, model: Path | None) -> Path:
    """As huggingface_hub lays a model out: blobs, and a snapshot of links to them."""
    folder = hub / "--".join(["models", *name.split("/")])
    snapshot = folder / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (folder / "blobs").mkdir()
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0123abcd")
    for file in model.iterdir() if model else ():
        blob = folder / "blobs" / f"of-{file.name}"
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    return folder


def of_unknown_architecture(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))


def without_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def damaged(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def test_every_model_is_listed_with_its_size_and_whether_it_runs(folders: Folders, tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    sound = tiny_llama(tmp_path / "sound", layers=1)
    whole = in_hub(hub, "someone/tiny", sound)
    spoilt: dict[str, Callable[[Path], None]] = {
        "mamba": of_unknown_architecture,
        "partial": without_weights,
        "short": damaged,
    }
    for name, spoil in spoilt.items():
        spoil(model := Path(shutil.copytree(sound, tmp_path / name)))
        in_hub(hub, f"someone/{name}", model)
    in_hub(hub, "someone/empty", None)
    found = {model.name: model for model in held_models(hub=hub)}
    demo = str(cache_folder() / f"demo-{DEMO_SIZE}")
    assert found.keys() == {"demo", demo, "someone/tiny", "someone/empty", *(f"someone/{name}" for name in spoilt)}
    assert [found[name].problem for name in ("demo", demo, "someone/tiny")] == ["", "", ""]
    assert {found[name].architecture for name in ("demo", demo, "someone/tiny")} == {"llama"}
    assert found["someone/tiny"].path == find_model("someone/tiny", hub)
    assert found["someone/tiny"].nbytes == size_on_disk(whole) >= (sound / "model.safetensors").stat().st_size
    assert found[demo].nbytes >= DEMO_SIZE
    assert "'mamba', which llmcad does not know" in found["someone/mamba"].problem
    assert found["someone/partial"].problem == "incomplete: model.safetensors missing"
    assert "incomplete" in found["someone/empty"].problem
    assert "truncated" in found["someone/short"].problem


def llmcad(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llmcad_actors.cli", *words]
    environment = os.environ | {"COLUMNS": "300"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, **options)


def test_the_command_shows_them_as_a_table_and_as_json(folders: Folders, tmp_path: Path) -> None:
    in_hub(tmp_path / "hub", "some[one]/tiny", tiny_llama(tmp_path / "tiny", layers=1))
    table = llmcad("models")
    assert table.returncode == 0, table.stderr
    for word in ("some[one]/tiny", "Hugging Face", "llama", f"demo-{DEMO_SIZE}", str(tmp_path / "hub"), "bundled"):
        assert word in table.stdout
    listed = json.loads(llmcad("models", "--json").stdout)
    assert {model["name"]: model["can_run"] for model in listed["models"]} == {
        "demo": True,
        str(cache_folder() / f"demo-{DEMO_SIZE}"): True,
        "some[one]/tiny": True,
    }
    assert listed["caches"] == {"llmcad": str(cache_folder()), "Hugging Face": str(tmp_path / "hub")}


def files_of(*folders: Path) -> set[Path]:
    return {path for folder in folders for path in folder.rglob("*") if path.is_file()}


def gone_pid() -> int:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


def session(folder: Path, pid: int) -> Path:
    made = folder / f"session_2026-01-01_00-00-00_123456_{pid}"
    made.mkdir(parents=True)
    (made / "log").write_text("x")
    return made


def strangers(cache: Path, temporary: Path, hub: Path) -> set[Path]:
    """Files that must stay, among what may go and under names like its."""
    made = {
        cache / "doctor.json",
        cache / "demo-mine" / "llmcad_enlarged.json",  # another name
        cache / "demo-123" / "model.safetensors",  # nothing says that llmcad made it
        cache / "demo-77.partial" / "llmcad_enlarged.json",  # being written
        temporary / "llmcad-notes" / "text",
        session(temporary / "llmcad-living", os.getpid()) / "log",
        hub / "models--a--b" / "snapshots" / "x" / "demo-123" / "llmcad_enlarged.json",
        cache.parent / "elsewhere" / "llmcad_enlarged.json",
    }
    for file in made - {cache / "doctor.json"}:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
    (cache / "demo-55").symlink_to(cache.parent / "elsewhere")
    return made


def test_what_was_made_is_removed_and_nothing_else(folders: Folders, tmp_path: Path) -> None:
    cache, temporary = folders
    session(temporary / "llmcad-dead", gone_pid())
    (cache / "logs").mkdir()
    (cache / "logs" / "run.log").write_text("x")
    stale, old = cache / "demo-66.0123abcd.partial", cache / "demo-66.partial"
    for path in (stale, old):
        shutil.copytree(cache / f"demo-{DEMO_SIZE}", path)
    sketch = temporary / "llmcad-sketch-x"
    sketch.mkdir()
    for path in (stale, *stale.iterdir(), old, *old.iterdir(), sketch):
        os.utime(path, (0, 0))
    stay = strangers(cache, temporary, tmp_path / "hub")
    before = files_of(bundled_target())
    found, _ = leftovers(cache, temporary)
    mine = [each for each in found if each.path.is_relative_to(tmp_path)]  # the rest is of the machine's shared memory
    assert {each.path for each in mine} == {
        *(cache / f"demo-{DEMO_SIZE}", stale, old, cache / "logs", temporary / "llmcad-dead", sketch)
    }
    assert sum(each.nbytes for each in mine) >= 2 * DEMO_SIZE
    for each in mine:
        remove(each)
    assert not [each for each in leftovers(cache, temporary)[0] if each.path.is_relative_to(tmp_path)]
    assert files_of(tmp_path) == stay
    assert files_of(bundled_target()) == before


@contextmanager
def running_session(temporary: Path) -> Iterator[None]:
    """A process that looks like a daemon of a session whose driver, this process, is alive."""
    folder = session(temporary / "llmcad-living", os.getpid())
    command = [sys.executable, "-c", "import time; time.sleep(600)", f"--log_dir={folder}/logs"]
    with subprocess.Popen(command) as daemon:
        try:
            yield
        finally:
            daemon.kill()


def test_while_a_session_runs_models_and_logs_stay(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("LLMCAD_CACHE", str(folders[0]))
    monkeypatch.setenv("TMPDIR", str(folders[1]))
    with running_session(folders[1]):
        done = llmcad("clean", "--yes")
    assert done.returncode == 0, done.stderr
    assert "a session is running: enlarged models and logs stay" in done.stderr
    assert (folders[0] / f"demo-{DEMO_SIZE}" / "config.json").exists()
    assert (folders[1] / "llmcad-living").exists()


def clean(answer: bytes, *words: str) -> tuple[int, str]:
    """At a terminal, in which sessions of others do not count."""
    main, child = pty.openpty()
    script = (
        "import llmcad_actors.tools.caches as caches, sys; caches.is_a_session_running = lambda: False; "
        "from llmcad_actors.machine.orphans import Orphans; caches.find_orphans = lambda *_: Orphans(); "
        "from llmcad_actors.cli.command import main; sys.argv = ['llmcad', 'clean', *sys.argv[1:]]; main()"
    )
    with subprocess.Popen([sys.executable, "-c", script, *words], stdin=child, stderr=subprocess.PIPE) as process:
        os.close(child)
        os.write(main, answer)
        assert process.stderr is not None
        said = process.stderr.read().decode()
        code = process.wait(120)
    os.close(main)
    return code, said


def test_it_asks_and_a_no_removes_nothing(folders: Folders) -> None:
    model = folders[0] / f"demo-{DEMO_SIZE}"
    code, said = clean(b"n\n")
    assert (code, model.exists()) == (0, True)
    assert "Remove these" in said
    assert "nothing was removed" in said
    code, said = clean(b"y\n")
    assert (code, model.exists()) == (0, False)
    code, said = clean(b"")
    assert (code, "there is nothing to remove" in said) == (0, True)


def test_where_nobody_can_be_asked_it_removes_nothing_without_yes(
    folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caches, "find_orphans", lambda *_: Orphans())
    model = folders[0] / f"demo-{DEMO_SIZE}"
    refused = CliRunner().invoke(app, ["clean"])
    assert (refused.exit_code, model.exists()) == (2, True)
    assert "nobody can be asked here; llmcad clean --yes removes these" in refused.stderr
    done = CliRunner().invoke(app, ["clean", "--yes"])
    assert (done.exit_code, model.exists()) == (0, False)
    assert (folders[0] / "doctor.json").exists()
