"""Trace a request: from the engine's actors to a file."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

from llmcad_actors.actors.collector import TraceCollector
from llmcad_actors.actors.runtime import Actors
from llmcad_actors.core.request import Request
from llmcad_actors.plan.job import Prepared
from llmcad_actors.trace.file import TraceHeader, TraceWriter


@contextmanager
def traced(file: str | os.PathLike[str] | None, actors: Actors, prepared: Prepared, request: Request) -> Iterator[None]:
    """What the actors do inside goes to `file`; with None, nothing is recorded. Raises `UserError` for a bad path."""
    if file is None:
        yield
        return
    writer = TraceWriter(Path(file), header_of(prepared, request))
    collector = TraceCollector(lambda: lanes(actors), writer.write)
    try:
        with collector:
            yield
    finally:
        writer.close(collector.missing)


def header_of(prepared: Prepared, request: Request) -> TraceHeader:
    return TraceHeader(
        target=str(prepared.target.path.resolve()),
        draft=str(prepared.draft.path.resolve()) if prepared.draft else None,
        settings=asdict(prepared.config),
        prompt=request.prompt,
        max_new_tokens=request.max_new_tokens,
        started=time.monotonic(),
        date=datetime.now().astimezone().isoformat(timespec="seconds"),
        llmcad=version("llmcad-actors"),
    )


def lanes(actors: Actors) -> dict[str, object]:
    named = {
        "coordinator": actors.coordinator,
        "draft": actors.draft,
        "verifier": actors.verifier,
        "loader": actors.loader,
    }
    return {lane: actor for lane, actor in named.items() if actor is not None}
