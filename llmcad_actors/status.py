"""The status line: where the pass is, how fast the disk delivers, what memory is in use. Never looks like a hang."""

import threading
from collections.abc import Callable
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

from llmcad_actors.core.budget import format_size
from llmcad_actors.core.stats import Stats
from llmcad_actors.engine import Engine

REFRESH_S = 0.25


class StatusLine:
    """One line on standard error, redrawn from a thread while a request runs; silent where nobody looks."""

    def __init__(self, console: Console) -> None:
        self._live = Live(Text(), console=console, transient=True, auto_refresh=False)
        self._is_shown = console.is_terminal
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._rate = 0.0

    def __enter__(self) -> Self:
        if self._is_shown:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(5)
        if self._is_shown:
            self._live.stop()

    def say(self, what: str) -> None:
        """What is being waited for."""
        if self._is_shown:
            self._live.update(Text(f"{what} ...", style="dim"), refresh=True)

    def follow(self, engine: Engine, stats: Callable[[], Stats | None]) -> None:
        """Show the engine's status until the line is closed."""
        if self._is_shown:
            self._thread = threading.Thread(target=self._follow, args=(engine, stats), daemon=True)
            self._thread.start()

    def _follow(self, engine: Engine, stats: Callable[[], Stats | None]) -> None:
        before = engine.status()
        while not self._stop.wait(REFRESH_S):
            now = engine.status()
            seconds = now.read_seconds - before.read_seconds
            if seconds > 0.05:
                self._rate = (now.bytes_read - before.bytes_read) / seconds
                before = now
            memory = f"{format_size(now.memory_bytes)} of {format_size(now.memory_cap_bytes)}"
            parts = [f"{now.shard} {now.shard_index + 1}/{now.num_shards}", f"{self._rate / 1e6:.0f} MB/s", memory]
            if (known := stats()) is not None and known.target_passes:
                parts.insert(0, f"{known.new_tokens} tokens, {known.tokens_per_pass:.1f} a pass")
            self._live.update(Text("  ".join(parts), style="dim"), refresh=True)
