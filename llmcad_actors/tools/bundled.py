"""The bundled pair, and the demo's target: the bundled one enlarged, once, to a size that does not fit."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from llmcad_actors.machine.cache import cache_folder

PAIR = Path(__file__).parents[1] / "assets" / "pair"
DEMO = "demo"
DEMO_BYTES = 2_500_000_000
SKETCHES = "llmcad-sketch-"

OnProgress = Callable[[int, int], None]


def bundled_target() -> Path:
    """A small trained Llama-architecture model that continues Python source."""
    return PAIR / "target"


def bundled_draft() -> Path:
    """The bundled target's draft."""
    return PAIR / "draft"


def demo_folder(size_bytes: int = DEMO_BYTES) -> Path:
    """Where the demo's target is, or will be."""
    return cache_folder() / f"demo-{size_bytes}"


def is_demo_made(size_bytes: int = DEMO_BYTES) -> bool:
    """Whether `demo_target` will write nothing (it may still refuse what it finds)."""
    from llmcad_actors.tools.enlarge import RECORD

    return (demo_folder(size_bytes) / RECORD).is_file()


def demo_target(size_bytes: int = DEMO_BYTES, progress: OnProgress | None = None) -> Path:
    """The bundled target, enlarged to at least `size_bytes` with the same function; made on first use."""
    return _enlarged(bundled_target(), "demo", size_bytes, progress)


def demo_draft(size_bytes: int, progress: OnProgress | None = None) -> Path:
    """The bundled draft, enlarged likewise: a draft whose steps are dear, as beside most targets."""
    return _enlarged(bundled_draft(), "draft", size_bytes, progress)


@contextmanager
def sketched_demo(size_bytes: int = DEMO_BYTES) -> Iterator[Path]:
    """The demo's target for planning: its headers, on the disk that it will be on, and no weights; gone afterwards.

    Where the target has been made, the target itself.
    """
    if is_demo_made(size_bytes):
        yield demo_target(size_bytes)
        return
    from llmcad_actors.tools.enlarge import sketch

    with _temporary(cache_folder()) as folder:
        yield sketch(bundled_target(), Path(folder) / demo_folder(size_bytes).name, target_bytes=size_bytes)


def _temporary(near: Path) -> "tempfile.TemporaryDirectory[str]":
    """A folder on the disk of `near`, which need not be there; elsewhere where that cannot be written."""
    while not near.is_dir() and near != near.parent:
        near = near.parent
    try:
        return tempfile.TemporaryDirectory(prefix=SKETCHES, dir=near)
    except OSError:
        return tempfile.TemporaryDirectory(prefix=SKETCHES)


def _enlarged(source: Path, name: str, size_bytes: int, progress: OnProgress | None) -> Path:
    from llmcad_actors.tools.enlarge import enlarge  # here: numpy is not needed to know where things are

    return enlarge(source, cache_folder() / f"{name}-{size_bytes}", target_bytes=size_bytes, progress=progress)
