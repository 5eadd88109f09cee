"""The bundled pair, and the demo's target: the bundled one enlarged, once, to a size that does not fit."""

import os
from collections.abc import Callable
from pathlib import Path

from llmcad_actors.enlarge import enlarge

PAIR = Path(__file__).parent / "assets" / "pair"
DEMO = "demo"
DEMO_BYTES = 2_500_000_000

OnProgress = Callable[[int, int], None]


def bundled_target() -> Path:
    """A small trained Llama-architecture model that continues Python source."""
    return PAIR / "target"


def bundled_draft() -> Path:
    """The bundled target's draft."""
    return PAIR / "draft"


def cache_folder() -> Path:
    """Where what llmcad makes is kept: $LLMCAD_CACHE, else the user's cache folder."""
    if folder := os.environ.get("LLMCAD_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmcad"


def demo_target(size_bytes: int = DEMO_BYTES, progress: OnProgress | None = None) -> Path:
    """The bundled target, enlarged to at least `size_bytes` with the same function; made on first use."""
    return _enlarged(bundled_target(), "demo", size_bytes, progress)


def demo_draft(size_bytes: int, progress: OnProgress | None = None) -> Path:
    """The bundled draft, enlarged likewise: a draft whose steps are dear, as beside most targets."""
    return _enlarged(bundled_draft(), "draft", size_bytes, progress)


def _enlarged(source: Path, name: str, size_bytes: int, progress: OnProgress | None) -> Path:
    return enlarge(source, cache_folder() / f"{name}-{size_bytes}", target_bytes=size_bytes, progress=progress)
