"""An engine that gives what it was told to, without models or processes."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from llmcad_actors.core.stats import Stats
from llmcad_actors.errors import LlmcadError, RuntimeFailure
from llmcad_actors.results import Piece, Result, Status

STATUS = Status("layer.7", 7, 24, 0, 0.0, 1_310_000_000, 1_500_000_000, 24, 4.2, 8.0)


class RecordedEngine:
    """Gives `pieces`, then ends, or breaks with `error`. Each accepted piece is a pass of one second."""

    def __init__(self, pieces: Sequence[Piece], *, error: BaseException | None = None) -> None:
        self._pieces = pieces
        self._error = error
        self._stats: Stats | None = None
        self.has_ended = False  # the last request
        self.asked: list[bool] = []  # for guesses
        self.num_status = 0

    def stream(self, prompt: str, *, provisional: bool = False, **options: Any) -> Iterator[Piece]:
        self.asked.append(provisional)
        self._stats, self.has_ended = None, False
        try:
            for piece in self._pieces:
                if not piece.provisional:
                    self._stats = self._after(piece)
                if provisional or not piece.provisional:
                    yield piece
            if self._error is not None:
                raise self._error
        finally:
            self.has_ended = True

    def generate(self, prompt: str, **options: Any) -> Result:
        return self.result(list(self.stream(prompt, **options)))

    def result(self, pieces: Sequence[Piece]) -> Result:
        ids = tuple(i for piece in pieces for i in piece.token_ids)
        return Result("".join(piece.text for piece in pieces), ids, "length", self.stats)

    @property
    def stats(self) -> Stats:
        if self._stats is None:
            raise RuntimeFailure("no request has been finished")
        return self._stats

    def status(self) -> Status:
        if self.has_ended and isinstance(self._error, LlmcadError):
            raise self._error
        self.num_status += 1
        return STATUS

    def _after(self, piece: Piece) -> Stats:
        stats = self._stats or Stats()
        tokens, passes = stats.new_tokens + len(piece.token_ids), stats.target_passes + 1
        per_pass = tokens / passes
        return replace(stats, new_tokens=tokens, target_passes=passes, tokens_per_pass=per_pass, seconds=float(passes))
