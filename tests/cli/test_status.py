"""What the status line, the summary and the demo's comparison say."""

import threading
from dataclasses import replace

import pytest

from llmcad_actors.cli.comparison import Comparison
from llmcad_actors.cli.status import ReadRate, StatusLine, describe, format_seconds, speed, summary
from llmcad_actors.core.stats import Stats
from llmcad_actors.errors import ActorFailure
from llmcad_actors.results import Result, Status
from tests.cli.test_terminal import on_one_terminal
from tests.recorded import STATUS, RecordedEngine
from tests.screens import Pty

STATS = Stats(
    seconds=19.0,
    new_tokens=96,
    tokens_per_pass=4.2,
    bytes_read=52_210_000_000,
    read_seconds=19.0,
    memory_cap_bytes=1_500_000_000,
    peak_memory_bytes=1_300_000_000,
)


def test_the_status_has_speed_time_passes_disk_and_memory() -> None:
    assert describe(STATUS, 12.3, 1.8e9) == (
        "3.0 tokens/s | 12 s | 4.2 tokens a pass | 1800 MB/s | 1.31 GB of 1.50 GB | layer.7 (8 of 24)"
    )


def test_no_figure_is_shown_before_it_is_known() -> None:
    status = replace(STATUS, new_tokens=0, tokens_per_pass=0.0, seconds=0.0)
    assert describe(status, 0.0, 0.0) == "first pass | 0 s | 1.31 GB of 1.50 GB | layer.7 (8 of 24)"


def test_where_nothing_is_read_the_status_says_so() -> None:
    status = replace(STATUS, shard="head.0", shard_index=0, num_shards=0)
    assert describe(status, 12.3, 0.0) == (
        "3.0 tokens/s | 12 s | 4.2 tokens a pass | all weights in memory | 1.31 GB of 1.50 GB"
    )
    assert "nothing read from disk" in summary(replace(STATS, bytes_read=0, read_seconds=0.0))


def test_a_rate_is_that_of_the_latest_stretch_of_reading() -> None:
    rate = ReadRate()
    assert rate.after(STATUS) == 0.0
    assert rate.after(replace(STATUS, bytes_read=10**9, read_seconds=0.01)) == 0.0  # too short to tell
    assert rate.after(replace(STATUS, bytes_read=2 * 10**9, read_seconds=2.0)) == 1e9
    assert rate.after(replace(STATUS, bytes_read=2 * 10**9, read_seconds=2.0)) == 1e9
    assert rate.after(replace(STATUS, bytes_read=3 * 10**9, read_seconds=4.0)) == 5e8


def test_the_summary_has_the_whole_run() -> None:
    assert summary(STATS) == (
        "96 tokens in 19 s: 5.1 tokens/s | 4.2 tokens a pass | 52.21 GB read, 2748 MB/s | "
        "peak memory 1.30 GB of 1.50 GB"
    )
    assert summary(replace(STATS, new_tokens=1)).startswith("1 token in ")


@pytest.mark.parametrize(
    ("tokens", "seconds", "said"), [(0, 0.0, "0"), (1, 14.0, "0.071"), (5, 1.0, "5.0"), (124, 10.0, "12")]
)
def test_a_speed_has_two_digits_that_count(tokens: int, seconds: float, said: str) -> None:
    assert speed(tokens, seconds) == said


@pytest.mark.parametrize(("seconds", "said"), [(0.9, "0 s"), (59.9, "59 s"), (60.0, "1:00 min"), (3725.0, "1:02:05 h")])
def test_a_duration_is_as_people_write_it(seconds: float, said: str) -> None:
    assert format_seconds(seconds) == said


def test_nobody_asks_the_engine_once_it_is_not_followed_any_more() -> None:
    engine = RecordedEngine(())
    with Pty(100, 6) as pty, on_one_terminal(pty), StatusLine() as line:
        with line.following(engine, "once more"):
            while not engine.num_status:
                pty.take(0.01)
        num, left = engine.num_status, [thread.name for thread in threading.enumerate()]
        assert "llmcad-status" not in left
        pty.take()
        assert "once more: 3.0 tokens/s" in pty.received.decode()
        assert pty.screen.text() == ""
        assert engine.num_status == num


def test_leaving_waits_for_an_answer_that_is_on_its_way() -> None:
    """Once left, the engine may be closed: a question that is asked then would come to no one."""
    asked, may_answer = threading.Event(), threading.Event()

    class Slow:
        def status(self) -> Status:
            asked.set()
            may_answer.wait()
            return STATUS

    with Pty(100, 6) as pty, on_one_terminal(pty), StatusLine() as line:
        with line.following(Slow()):
            asked.wait()
            threading.Timer(0.2, may_answer.set).start()
        assert "llmcad-status" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(
    "error", [ActorFailure("died"), Exception("Ray has gone"), OSError(5, "no terminal")], ids=repr
)
def test_a_status_that_cannot_be_had_ends_the_thread_and_nothing_else(error: Exception) -> None:
    class Broken:
        def status(self) -> None:
            raise error

    with Pty(100, 6) as pty, on_one_terminal(pty), StatusLine() as line:
        with line.following(Broken()):  # type: ignore[arg-type]
            line.write("text")
        line.end()
        pty.take()
        assert pty.screen.text() == "text"


def test_an_error_inside_ends_the_thread_too() -> None:
    with Pty(100, 6) as pty, on_one_terminal(pty), StatusLine() as line:
        with pytest.raises(KeyboardInterrupt), line.following(RecordedEngine(())):
            raise KeyboardInterrupt
        assert "llmcad-status" not in [thread.name for thread in threading.enumerate()]


def result(*ids: int, reason: str = "length", seconds: float = 1.0) -> Result:
    return Result(" ".join(map(str, ids)), ids, reason, Stats(seconds=seconds, new_tokens=len(ids)))


@pytest.mark.parametrize(
    ("fast", "plain", "difference"),
    [
        (result(1, 2, 3), result(1, 2), None),
        (result(1, 2), result(1, 2, 3), None),
        (result(1, 2), result(1, 2), None),
        (result(1, 2, 3), result(1, 4), 1),
        (result(1, 2, 3), result(1, 2, reason="stop"), 2),  # one went on behind the end of the other
        (result(1, 2, reason="stop"), result(1, 2, 3), 2),
        (result(1, 2, reason="stop"), result(1, 2), None),
    ],
    ids=str,
)
def test_two_texts_are_compared_token_by_token(fast: Result, plain: Result, difference: int | None) -> None:
    compared = Comparison(fast, plain)
    assert compared.difference == difference
    assert compared.is_same == (difference is None)
    assert compared.verdict.startswith("Both texts are the same" if compared.is_same else "THE TEXTS DIFFER")


def test_the_verdict_has_the_factor() -> None:
    faster = Comparison(result(1, 2, 3, 4, seconds=2.0), result(1, 2, seconds=3.0))
    assert faster.verdict == "Both texts are the same (2 tokens compared), and speculation is 3.0 times faster."
    slower = Comparison(result(1, seconds=3.0), result(1, seconds=1.5))
    assert slower.verdict == "Both texts are the same (1 token compared), and speculation is 2.0 times slower."
