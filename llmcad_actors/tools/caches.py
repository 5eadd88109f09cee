"""What the caches hold: llmcad's own folder, and the Hugging Face cache. And what of it can be removed for room.

Looks at headers and sizes; reads no weights. Of what is not llmcad's own it removes nothing.
"""

import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from llmcad_actors.errors import LlmcadError, StorageError
from llmcad_actors.machine.cache import cache_folder
from llmcad_actors.machine.orphans import find_orphans, is_a_session_running
from llmcad_actors.storage.checkpoint import Checkpoint
from llmcad_actors.storage.layout import layout_of
from llmcad_actors.storage.model_names import CachedModel, cached_models
from llmcad_actors.storage.new_folder import UNFINISHED, is_being_made
from llmcad_actors.tools.bundled import DEMO, PAIR, SKETCHES
from llmcad_actors.tools.enlarge import RECORD

BUNDLED, OWN, HUB = "bundled", "llmcad", "Hugging Face"
ENLARGED = re.compile(r"(demo|draft)-\d+")
LOGS = "logs"
BEING_WRITTEN_S = 60.0
"""What was changed so lately may still be written by somebody."""


@dataclass(frozen=True, slots=True)
class HeldModel:
    """A model that can be given as --target or --draft, or would be if it were complete."""

    name: str  # as the options take it; a path for what llmcad enlarged
    place: str  # "bundled" | "llmcad" | "Hugging Face"
    path: Path
    nbytes: int  # on the disk
    architecture: str  # the config's model_type; empty where it cannot be read
    problem: str  # why it cannot be run; empty where it can


@dataclass(frozen=True, slots=True)
class Leftover:
    """Something of llmcad's that can be removed."""

    what: str
    path: Path
    nbytes: int


def held_models(cache: Path | None = None, hub: Path | None = None) -> list[HeldModel]:
    """The bundled pair, enlarged models and those of the Hugging Face cache. cache, hub: default the user's."""
    bundled = _held(DEMO, BUNDLED, PAIR / "target", PAIR)
    own = [_held(str(folder), OWN, folder, folder) for folder in _enlarged(cache or cache_folder())]
    return [bundled, *own, *(_of_hub(model) for model in cached_models(hub))]


def _of_hub(model: CachedModel) -> HeldModel:
    if model.snapshot is None or model.missing:
        more = f" and {len(model.missing) - 1} more" if len(model.missing) > 1 else ""
        problem = f"incomplete: {model.missing[0]}{more} missing"
        return HeldModel(model.name, HUB, model.folder, size_on_disk(model.folder), "", problem)
    return _held(model.name, HUB, model.snapshot, model.folder)


def _held(name: str, place: str, path: Path, folder: Path) -> HeldModel:
    """path: the checkpoint. folder: all that it takes on the disk."""
    architecture = problem = ""
    try:
        checkpoint = Checkpoint.open(path)
        architecture = str(checkpoint.config.get("model_type", ""))
        layout_of(checkpoint)
    except LlmcadError as error:
        problem = str(error).removeprefix(f"{path} ").partition("; ")[0].rstrip(".")
    return HeldModel(name, place, path, size_on_disk(folder), architecture, problem)


def leftovers(cache: Path | None = None, temporary: Path | None = None) -> tuple[list[Leftover], bool]:
    """What can be removed; and whether models and logs were left out because a session is running that may use them."""
    cache, temporary = cache or cache_folder(), temporary or Path(tempfile.gettempdir())
    is_running = is_a_session_running()
    found = [] if is_running else [*_models_of(cache), *_logs_of(cache)]
    orphans = find_orphans(temporary)
    found += [Leftover("session that has ended", path, size_on_disk(path)) for path in orphans.folders]
    found += [Leftover("shared memory of such a session", path, size_on_disk(path)) for path in orphans.shared_files]
    for place in {cache, cache.parent, temporary}:
        sketches = [path for path in sorted(place.glob(f"{SKETCHES}*")) if not _is_being_written(path)]
        found += [Leftover("unfinished plan", path, size_on_disk(path)) for path in sketches]
    return found, is_running


def _models_of(cache: Path) -> Iterator[Leftover]:
    for folder in _enlarged(cache):
        yield Leftover("enlarged model, made again when needed", folder, size_on_disk(folder))
    for folder in sorted(cache.glob("*.partial")):
        unfinished = UNFINISHED.fullmatch(folder.name)
        if not unfinished or not _is_ours(folder, unfinished["name"]):
            continue
        if not _is_being_written(folder) and not is_being_made(folder):
            yield Leftover("unfinished enlarged model", folder, size_on_disk(folder))


def _enlarged(cache: Path) -> list[Path]:
    return [folder for folder in sorted(cache.glob("*")) if _is_ours(folder, folder.name)]


def _is_ours(folder: Path, name: str) -> bool:
    return ENLARGED.fullmatch(name) is not None and not folder.is_symlink() and (folder / RECORD).is_file()


def _logs_of(cache: Path) -> Iterator[Leftover]:
    logs = cache / LOGS
    if logs.is_dir() and not logs.is_symlink() and any(logs.iterdir()):
        yield Leftover("logs", logs, size_on_disk(logs))


def _is_being_written(folder: Path) -> bool:
    return time.time() - max((stat.st_mtime for stat in _stats(folder)), default=0.0) < BEING_WRITTEN_S


def remove(leftover: Leftover) -> None:
    """Raises `StorageError`."""
    try:
        if leftover.path.is_dir() and not leftover.path.is_symlink():
            shutil.rmtree(leftover.path)
        else:
            leftover.path.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"{leftover.path} cannot be removed: {error.strerror}; remove it by hand") from None


def size_on_disk(path: Path) -> int:
    """Bytes of blocks of a file, or of all in a folder; what links point to does not count."""
    return sum({(stat.st_dev, stat.st_ino): stat.st_blocks * 512 for stat in _stats(path)}.values())


def _stats(path: Path) -> Iterator[os.stat_result]:
    """Of a file, or of a folder and all in it that is still there."""
    for each in (path, *path.rglob("*")) if path.is_dir() and not path.is_symlink() else (path,):
        with suppress(OSError):
            yield each.lstat()
