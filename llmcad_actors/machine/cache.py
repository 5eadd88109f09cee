"""Where llmcad keeps what it made: models, figures, logs."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where what llmcad makes is kept: $LLMCAD_CACHE, else the user's cache folder."""
    if folder := os.environ.get("LLMCAD_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmcad"
