"""A model's name on the Hugging Face Hub -> its directory in the local cache. Never downloads."""

import re
from dataclasses import dataclass
from pathlib import Path

from llmcad_actors.core.quoting import shown
from llmcad_actors.errors import CheckpointError
from llmcad_actors.storage.checkpoint import INDEX, SINGLE, weight_map_of
from llmcad_actors.storage.small_file import read_text, reason

COMMIT_BYTES = 1000
_COMMIT = re.compile(r"[\w-][\w.-]*", re.ASCII)
NAME = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?", re.ASCII)  # "gpt2", "meta-llama/Llama-2-13b-hf"


def find_model(name: str, cache: Path | None = None) -> Path:
    """The directory that `name` stands for: an existing path, or the cached snapshot of the model so called.

    cache: where to look for names; default: what `HF_HUB_CACHE` and `HF_HOME` say. What cannot be a name is
    taken for a path. Raises `CheckpointError` for a name that is not in the cache, or not all of it.
    """
    try:
        path = Path(name).expanduser()
        if path.exists() or not NAME.fullmatch(name):
            return path
        return _find_cached(name, cache or hub_cache())
    except (OSError, ValueError, RuntimeError) as error:  # too long, a null byte, `~` of a user who is not there
        raise CheckpointError(f"cannot look for the model {shown(name)}: {reason(error)}") from None


def _find_cached(name: str, cache: Path) -> Path:
    folder = cache / "--".join(["models", *name.split("/")])
    if not folder.is_dir():
        raise CheckpointError(
            f"{name} is neither a directory here nor a model in the Hugging Face cache ({shown(cache)}); fetch it "
            f"with `hf download {shown(name)}`, or give the path of a model directory"
        )
    snapshot = _snapshot(folder)
    missing = ["a snapshot"] if snapshot is None else _missing(snapshot)
    if snapshot is None or missing:
        verb = "is" if len(missing) == 1 else "are"
        raise CheckpointError(
            f"{name} is in the Hugging Face cache ({shown(folder)}) only in part: {shown(', '.join(missing[:3]))} "
            f"{verb} missing{_unfinished(folder)}; complete it with `hf download {name}`"
        )
    return snapshot


@dataclass(frozen=True, slots=True)
class CachedModel:
    """A model in the Hugging Face cache."""

    name: str  # as `find_model` takes it
    folder: Path  # with all snapshots and files
    snapshot: Path | None  # that `find_model` would give
    missing: tuple[str, ...]  # what it needs and lacks


def cached_models(cache: Path | None = None) -> list[CachedModel]:
    """All models in the cache, complete or not, by name."""
    found = []
    for folder in sorted((cache or hub_cache()).glob("models--*")):
        if folder.is_dir():
            snapshot = _snapshot(folder)
            missing = ["a snapshot"] if snapshot is None else _missing(snapshot)
            name = "/".join(folder.name.split("--")[1:])
            found.append(CachedModel(name, folder, snapshot, tuple(missing)))
    return found


def hub_cache() -> Path:
    """The Hugging Face cache, as `HF_HUB_CACHE` and `HF_HOME` say."""
    import huggingface_hub.constants as constants  # here: planning a model directory needs none of it

    return Path(constants.HF_HUB_CACHE)


def _snapshot(folder: Path) -> Path | None:
    """The snapshot that `main` points to; the only one, where `main` was never fetched."""
    main = folder / "refs" / "main"
    if main.is_file():
        commit = read_text(main, COMMIT_BYTES).strip()
        snapshot = folder / "snapshots" / commit
        return snapshot if _COMMIT.fullmatch(commit) and snapshot.is_dir() else None
    snapshots = [path for path in (folder / "snapshots").glob("*") if path.is_dir()]
    return snapshots[0] if len(snapshots) == 1 else None


def _missing(snapshot: Path) -> list[str]:
    """Files that the model needs and the snapshot lacks. Links whose blob is absent count as absent."""
    names = ["config.json"]
    if not (snapshot / "config.json").is_file() and any(snapshot.glob("*.gguf")):
        return []  # such files come without one; opening says what to do
    if (snapshot / INDEX).is_file() and not (snapshot / SINGLE).is_file():
        names += _shards(snapshot / INDEX)
    elif not _has_other_weights(snapshot):
        names.append(SINGLE)
    return [name for name in names if not (snapshot / name).is_file()]


def _shards(index: Path) -> list[str]:
    try:
        return sorted(set(weight_map_of(index).values()))
    except CheckpointError:
        return []  # opening the checkpoint says what is wrong with it


def _has_other_weights(snapshot: Path) -> bool:
    """Weights of a format that opening the checkpoint knows to refuse, and says what to do."""
    return any(file.is_file() for kind in ("*.bin", "*.gguf", "*.pt") for file in snapshot.glob(kind))


def _unfinished(folder: Path) -> str:
    count = sum(1 for _ in (folder / "blobs").glob("*.incomplete"))
    return f" ({count} interrupted download{'s' if count > 1 else ''})" if count else ""
