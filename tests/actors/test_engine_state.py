"""Requests of many threads share an engine, which can be closed at any moment, and says so: a real engine."""

import gc
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray

from llmcad_actors import Engine, Piece
from llmcad_actors.errors import ConfigError, EngineBusyError, EngineClosedError, LlmcadError, StorageError
from llmcad_actors.plan.job import Prepared
from tests.actors.engines import job
from tests.tiny import tiny_llama

PROMPT, OTHER = "def area(r):\n", "import os"
DEADLINE_S = 60.0
LONG = 400  # tokens that take a minute: what is to break such a request does so long before its end


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """A random target, streamed in every pass, for a tenth of a second. It never ends a text by itself."""
    target = tiny_llama(tmp_path_factory.mktemp("target"), seed=12, max_file="200KB")
    return job(target, None, read_limit="4MB/s")


class Engines:
    """One engine for the tests, started anew when one of them has closed it."""

    def __init__(self, prepared: Prepared) -> None:
        self.prepared = prepared
        self._engine: Engine | None = None

    def open(self) -> Engine:
        if self._engine is None or self._engine._gate.is_closed:
            self._engine = Engine.start(self.prepared)
        return self._engine

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()


@pytest.fixture(scope="module")
def engines(prepared: Prepared) -> Iterator[Engines]:
    assert not ray.is_initialized()
    engines = Engines(prepared)
    yield engines
    engines.close()
    assert not ray.is_initialized()


@pytest.fixture
def engine(engines: Engines) -> Engine:
    return engines.open()


class Thread(threading.Thread):
    """A thread that keeps what its function raised; `ended` waits for it, not for ever."""

    def __init__(self, function: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self._function = function
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._function()
        except BaseException as error:
            self.error = error

    def ended(self) -> BaseException | None:
        self.join(DEADLINE_S)
        assert not self.is_alive()
        return self.error


def test_two_threads_share_passes_and_never_mix_their_texts(engine: Engine) -> None:
    alone = {prompt: engine.generate(prompt, max_new_tokens=6).token_ids for prompt in (PROMPT, OTHER)}
    found: dict[str, set[tuple[int, ...]]] = {PROMPT: set(), OTHER: set()}

    def ask(prompt: str) -> None:
        for _ in range(3):
            found[prompt].add(engine.generate(prompt, max_new_tokens=6).token_ids)

    stream = engine.stream(PROMPT, max_new_tokens=6)
    pieces = [next(stream)]
    threads = [Thread(lambda prompt=prompt: ask(prompt)) for prompt in (PROMPT, OTHER)]  # type: ignore[misc]
    pieces += stream
    assert [thread.ended() for thread in threads] == [None, None]
    assert found == {prompt: {ids} for prompt, ids in alone.items()}
    assert tuple(i for piece in pieces for i in piece.token_ids) == alone[PROMPT]
    before = engine.totals().requests
    together = [engine.submit(prompt, max_new_tokens=6) for prompt in (PROMPT, OTHER)]
    assert [each.result().token_ids for each in together] == list(alone.values())
    assert engine.totals().requests == before + 2
    read = sum(each.stats.bytes_read for each in together)  # each counts what was read meanwhile
    assert read > 1.5 * engine.generate(OTHER, max_new_tokens=6).stats.bytes_read


def test_an_open_stream_goes_on_whatever_comes_meanwhile(engine: Engine) -> None:
    whole = list(engine.stream(PROMPT, max_new_tokens=5))
    stream = engine.stream(PROMPT, max_new_tokens=5)
    pieces = [next(stream)]
    assert len(engine.generate(OTHER, max_new_tokens=3).token_ids) == 3
    assert engine.status().memory_cap_bytes == engine.prepared.memory.cap_bytes
    pieces += stream
    assert pieces == whole


def broken_out_of(engine: Engine) -> None:
    for _ in engine.stream(PROMPT, max_new_tokens=LONG):
        break


def forgotten(engine: Engine) -> None:
    stream = engine.stream(PROMPT, max_new_tokens=LONG)
    next(stream)
    del stream
    gc.collect()


def closed(engine: Engine) -> None:
    stream = engine.stream(PROMPT, max_new_tokens=LONG)
    next(stream)
    stream.close()
    stream.close()


def failed_at(engine: Engine) -> None:
    with pytest.raises(ZeroDivisionError):
        for piece in engine.stream(PROMPT, max_new_tokens=LONG):
            _ = len(piece.text) / 0


def never_begun(engine: Engine) -> None:
    engine.stream(PROMPT, max_new_tokens=LONG)


def refused(engine: Engine) -> None:
    with pytest.raises(ConfigError, match=r"max_new_tokens: 2\.5 must be a whole number"):
        engine.generate(PROMPT, max_new_tokens=2.5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="stop: 3 must be a text"):
        engine.stream(PROMPT, stop=3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="prompt: None must be text"):
        engine.generate(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("end", [broken_out_of, forgotten, closed, failed_at, never_begun, refused])
def test_a_request_that_has_ended_in_whatever_way_frees_the_engine(
    engine: Engine, end: Callable[[Engine], None]
) -> None:
    expected = engine.generate(OTHER, max_new_tokens=2)
    end(engine)
    again = engine.generate(OTHER, max_new_tokens=2)
    assert (again.text, again.token_ids) == (expected.text, expected.token_ids)


def test_a_text_as_stop_is_one_stop_string(engine: Engine) -> None:
    whole = engine.generate(PROMPT, max_new_tokens=10).text
    assert len(whole) == 10
    result = engine.generate(PROMPT, max_new_tokens=10, stop=whole[5:8])
    assert (result.text, result.finish_reason) == (whole[:5], "stop")
    unstopped = engine.generate(PROMPT, max_new_tokens=10, stop=whole[8] + whole[7])  # of letters that do come
    assert (unstopped.text, unstopped.finish_reason) == (whole, "length")


def test_a_second_engine_on_an_engines_own_ray_is_refused_with_three_ways_out(engine: Engine) -> None:
    with pytest.raises(EngineBusyError, match=r"close that engine first, or call ray\.init\(\) .* another process"):
        Engine.start(engine.prepared)
    assert len(engine.generate(PROMPT, max_new_tokens=2).token_ids) == 2


def test_a_file_that_changes_under_a_run_ends_it(engine: Engine) -> None:
    """And every other one, until it is as it was again."""
    expected, file = engine.generate(PROMPT, max_new_tokens=3), sorted(engine.prepared.target.stamps)[-1]
    status = file.stat()
    stream = engine.stream(PROMPT, max_new_tokens=LONG)
    next(stream)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
    try:
        for run in (lambda: list(stream), lambda: engine.generate(PROMPT, max_new_tokens=3)):
            with pytest.raises(StorageError, match=rf"{file} changed while it was in use: .* start again with"):
                run()
    finally:
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert engine.generate(PROMPT, max_new_tokens=3).token_ids == expected.token_ids


def refusals(engine: Engine) -> Iterator[LlmcadError]:
    """What a closed engine answers to everything but `close`."""
    calls: list[Callable[[], object]] = [
        lambda: engine.generate(PROMPT),
        lambda: engine.stream(PROMPT),
        lambda: engine.generate(PROMPT, chat=True),
        engine.status,
        engine.__enter__,
    ]
    for call in calls:
        with pytest.raises(EngineClosedError, match="the engine is closed") as raised:
            call()
        yield raised.value


def test_a_closed_engine_says_so_and_starts_no_ray(engine: Engine) -> None:
    """Closed from two threads at once, while a third waits for its stream's next piece and a fourth asks for status."""
    began, pieces = threading.Event(), list[Piece]()

    def read() -> None:
        for piece in engine.stream(PROMPT, max_new_tokens=LONG):
            pieces.append(piece)
            began.set()

    def watch() -> None:
        while True:
            engine.status()

    reading, watching = Thread(read), Thread(watch)
    assert began.wait(DEADLINE_S)
    closing = [Thread(engine.close) for _ in range(2)]
    assert [thread.ended() for thread in closing] == [None, None]
    assert not ray.is_initialized()
    assert isinstance(reading.ended(), EngineClosedError)
    assert isinstance(watching.ended(), EngineClosedError)
    engine.close()
    assert len(list(refusals(engine))) == 5
    assert engine.result(pieces).token_ids == tuple(i for piece in pieces for i in piece.token_ids)
    assert engine.stats.new_tokens >= len(pieces) > 0
    assert not ray.is_initialized()


def test_a_file_cut_short_under_a_run_ends_it_and_a_suspended_stream_outlives_the_close(
    engines: Engines, tmp_path: Path
) -> None:
    """No zeros, no wait: the loader cannot read on. Then the engine is closed in the middle of another stream."""
    engine = engines.open()
    file = max(engine.prepared.target.stamps, key=lambda file: file.stat().st_size)
    whole, status = file.read_bytes(), file.stat()
    stream = engine.stream(PROMPT, max_new_tokens=LONG)
    next(stream)
    os.truncate(file, len(whole) // 2)
    try:
        with pytest.raises(StorageError, match=rf"{file} changed while it was in use: it had .*, and has"):
            list(stream)
    finally:
        file.write_bytes(whole)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    engine.close()
    engine = engines.open()
    suspended = engine.stream(PROMPT, max_new_tokens=LONG, trace=tmp_path / "trace")
    first = next(suspended)
    engine.close()
    with pytest.raises(EngineClosedError, match="the engine is closed"):
        list(suspended)
    assert first.token_ids
    assert not ray.is_initialized()
