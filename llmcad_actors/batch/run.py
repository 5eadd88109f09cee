"""Runs the lines of a batch: so many at once that passes are full, and each result as soon as it is there."""

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Unpack

from llmcad_actors.batch.files import Line
from llmcad_actors.errors import CheckpointError, ConfigError, LlmcadError
from llmcad_actors.requests.generation import Generation
from llmcad_actors.requests.options import Options
from llmcad_actors.results import Result

OF_ONE_LINE = (ConfigError, CheckpointError)  # no room for the prompt, no token to go on with; others go on
TICK_S = 1.0  # the main thread looks up so often, so that an interruption reaches it


class Submits(Protocol):
    """An engine."""

    def submit(self, prompt: str, **options: Unpack[Options]) -> Generation: ...


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a batch has come."""

    done: int
    failed: int
    in_flight: int
    tokens: int


def run_batch(
    engine: Submits,
    lines: Iterable[Line],
    keep: Callable[[Mapping[str, Any]], None],
    show: Callable[[Progress], None],
    *,
    at_once: int,
) -> Progress:
    """Run `lines`, at most `at_once` of them under way; `keep` gets each result, or error, as it comes.

    A line that cannot be run is kept as an error, and the others go on. What breaks all requests is raised, once what
    had come before has been kept. However this ends, nothing is left running.
    """
    waiting, under_way = deque(lines), dict[str, Generation]()
    ended: queue.SimpleQueue[tuple[Line, Result | LlmcadError]] = queue.SimpleQueue()
    done, failed, tokens = 0, 0, 0
    try:
        while waiting or under_way:
            while waiting and len(under_way) < at_once:
                line = waiting.popleft()
                try:
                    under_way[line.id] = generation = engine.submit(line.prompt, **line.options)
                except OF_ONE_LINE as error:
                    ended.put((line, error))
                    break
                threading.Thread(target=_wait, args=(line, generation, ended), daemon=True).start()
            show(Progress(done, failed, len(under_way), tokens + _under_way(under_way.values())))
            for line, outcome in _taken(ended):
                under_way.pop(line.id, None)
                if isinstance(outcome, Result):
                    done, tokens = done + 1, tokens + len(outcome.token_ids)
                    keep({"id": line.id, **outcome.as_dict()})
                elif isinstance(outcome, OF_ONE_LINE):
                    failed += 1
                    keep({"id": line.id, "error": str(outcome)})
                else:
                    raise outcome
    finally:
        for generation in under_way.values():
            generation.cancel()
    progress = Progress(done, failed, 0, tokens)
    show(progress)
    return progress


def _wait(line: Line, generation: Generation, ended: "queue.SimpleQueue[tuple[Line, Result | LlmcadError]]") -> None:
    try:
        ended.put((line, generation.result()))
    except LlmcadError as error:
        ended.put((line, error))


def _taken(
    ended: "queue.SimpleQueue[tuple[Line, Result | LlmcadError]]",
) -> Sequence[tuple[Line, Result | LlmcadError]]:
    """What has ended; waits a little for the first."""
    try:
        found = [ended.get(timeout=TICK_S)]
    except queue.Empty:
        return []
    while not ended.empty():
        found.append(ended.get())
    return found


def _under_way(generations: Iterable[Generation]) -> int:
    return sum(each.stats.new_tokens for each in generations)
