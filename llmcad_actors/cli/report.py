"""The one JSON object that `--json` promises, however the run ends."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from llmcad_actors.cli import output
from llmcad_actors.core.stats import Stats
from llmcad_actors.plan.job import Prepared
from llmcad_actors.results import Piece, Result

ERROR, INTERRUPTED = "error", "interrupted"  # reasons to finish, beside an engine's own


class Account:
    """What a run has given so far. Writes the object once: at the end, or when the run breaks."""

    def __init__(self, job: Prepared, *, as_json: bool) -> None:
        """`as_json`: False writes nothing."""
        self.job = job
        self._is_due = as_json
        self._pieces: list[Piece] = []
        memory = job.memory
        self._planned: dict[str, Any] = {
            "memory_cap_bytes": memory.cap_bytes,
            "pinned_bytes": memory.pinned_bytes,
            "window_bytes": memory.window_bytes,
        }
        self._stats = replace(Stats(), **self._planned)

    def add(self, piece: Piece, stats: Stats) -> None:
        """An accepted piece, and the statistics with it."""
        self._pieces.append(piece)
        self.know(stats)

    def know(self, stats: Stats) -> None:
        """The statistics so far; what they do not tell of memory yet is as planned."""
        if not stats.memory_cap_bytes:
            stats = replace(stats, **self._planned)
        self._stats = stats

    def give(self, result: Result, **more: Any) -> None:
        """Write the object of a run that has ended well."""
        self._write({**result.as_dict(), **self._paths(), **more})

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """What breaks the run inside is written as the object first; then it goes on as it was."""
        try:
            yield
        except BaseException as error:
            is_ours = isinstance(error, Exception)  # else the user's: Ctrl-C, a signal
            ids = tuple(i for piece in self._pieces for i in piece.token_ids)
            text = "".join(piece.text for piece in self._pieces)
            so_far = Result(text, ids, ERROR if is_ours else INTERRUPTED, self._stats)
            message = str(error) or type(error).__name__
            self._write({**so_far.as_dict(), "error": message if is_ours else INTERRUPTED, **self._paths()})
            raise

    def _paths(self) -> dict[str, str | None]:
        draft = self.job.draft
        return {"target_path": str(self.job.target.path), "draft_path": str(draft.path) if draft else None}

    def _write(self, report: dict[str, Any]) -> None:
        if self._is_due:
            self._is_due = False
            output.write(json.dumps(report) + "\n")
