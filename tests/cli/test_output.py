"""Standard output carries the text, or the object, and nothing else, whatever is a terminal and however a run ends."""

import io
import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TextIO, cast

import psutil
import pytest
import yaml

from llmcad_actors.cli import output
from llmcad_actors.cli.columns import visible
from llmcad_actors.cli.report import Account
from llmcad_actors.cli.runs import generate, idle_draft
from llmcad_actors.cli.status import StatusLine
from llmcad_actors.config import EngineConfig
from llmcad_actors.core.budget import format_size
from llmcad_actors.core.stats import Stats
from llmcad_actors.engine import Engine
from llmcad_actors.errors import ActorFailure, StorageError
from llmcad_actors.plan.job import Prepared
from llmcad_actors.plan.prepare import prepare
from llmcad_actors.results import Piece
from llmcad_actors.tools.bundled import bundled_draft, bundled_target
from tests.actors.engines import job as make_job
from tests.actors.engines import slow
from tests.recorded import RecordedEngine
from tests.screens import Pty
from tests.tiny import tiny_llama

PROMPT = "Once upon a time"
COUNT = 40
DEADLINE_S = 200
EITHER = (False, True)
EVERY_COMBINATION = [(a, b, c) for a, b, c in itertools.product(EITHER, EITHER, EITHER)]
PIECES = (Piece("Once upon", (1, 2)), Piece(" a guess", (9,), provisional=True), Piece(" a time", (3, 4)))
LLMCAD = (sys.executable, "-m", "llmcad_actors.cli")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """A random model of bytes: its text is full of control characters, and of bytes that are no characters."""
    folder = tmp_path_factory.mktemp("output")
    target, draft = (tiny_llama(folder / name, seed=seed, layers=2) for seed, name in enumerate(("target", "draft")))
    return prepare(EngineConfig(target=str(target), draft=str(draft), memory="4GB", fallback="adaptive"))


@pytest.fixture(scope="module")
def engine(job: Prepared) -> Iterator[Engine]:
    with Engine.start(job) as engine:
        yield engine


@pytest.fixture(scope="module")
def text(engine: Engine) -> str:
    return engine.generate(PROMPT, max_new_tokens=COUNT).text


class Streams:
    """Standard input, output and error of this process: each the terminal or a file."""

    def __init__(self, folder: Path, *, terminals: tuple[bool, bool, bool]) -> None:
        self.pty = Pty(60, 10)
        self._files = [folder / name for name in ("in", "out", "err")]
        self._files[0].touch()
        self._are_terminals = terminals

    @contextmanager
    def in_place(self) -> Iterator[None]:
        with ExitStack() as stack:
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            patch.setenv("TERM", "xterm-256color")
            patch.delenv("NO_COLOR", raising=False)
            streams = [stack.enter_context(self._opened(i)) for i in range(3)]
            patch.setattr(sys, "stdin", streams[0])
            stack.enter_context(redirect_stdout(streams[1]))
            stack.enter_context(redirect_stderr(streams[2]))
            stack.enter_context(self.pty.attended())
            yield

    def _opened(self, index: int) -> TextIO:
        mode = "w" if index else "r"
        if self._are_terminals[index]:
            return cast(TextIO, os.fdopen(os.dup(self.pty.slave), mode, encoding="utf-8"))
        return cast(TextIO, self._files[index].open(mode, encoding="utf-8", newline=""))

    def written(self, index: int) -> str:
        return self._files[index].read_bytes().decode() if self._files[index].exists() else ""


def screen_of(text: str) -> str:
    """What a terminal shows of a text that is written plainly."""
    with Pty(60, 10) as pty:
        pty.stream.write(text)
        pty.stream.flush()
        pty.take()
        return pty.screen.text()


def ended(text: str) -> str:
    return text if text.endswith("\n") else text + "\n"


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
@pytest.mark.parametrize("terminals", EVERY_COMBINATION, ids=str)
def test_standard_output_carries_the_text_and_nothing_else(
    engine: Engine, job: Prepared, text: str, tmp_path: Path, terminals: tuple[bool, bool, bool], as_json: bool
) -> None:
    streams, account = Streams(tmp_path, terminals=terminals), Account(job, as_json=as_json)
    _, out_is_terminal, err_is_terminal = terminals
    with streams.pty, streams.in_place(), StatusLine() as line:
        line.say("starting the loader")
        generate(engine, line, account, PROMPT, as_json=as_json, quiet=False, max_new_tokens=COUNT)

    shown = streams.pty.received.decode()
    told = shown if err_is_terminal else streams.written(2)
    assert ("starting the loader ..." in shown) == err_is_terminal
    assert (f"{COUNT} tokens in " in told) == (not as_json)
    assert ("\x1b" in shown) == err_is_terminal
    assert "\x1b" not in streams.written(2)
    if not (err_is_terminal or as_json):
        assert len(streams.written(2).splitlines()) == 1
    if as_json:
        report = json.loads(
            shown.partition("{")[1] + shown.partition("{")[2] if out_is_terminal else streams.written(1)
        )
        assert report["text"] == text
    elif not out_is_terminal:
        assert streams.written(1) == ended(text)
    else:
        summary = told.replace("\x1b[2m", "").replace("\x1b[0m", "").splitlines()[-1] if err_is_terminal else ""
        assert streams.pty.screen.text() == screen_of(ended(visible(text)) + summary)


def test_a_guess_is_asked_for_only_where_it_can_be_shown(job: Prepared, tmp_path: Path) -> None:
    for number, terminals in enumerate(EVERY_COMBINATION):
        (folder := tmp_path / str(number)).mkdir()
        engine, streams = RecordedEngine(PIECES), Streams(folder, terminals=terminals)
        with streams.pty, streams.in_place(), StatusLine() as line:
            generate(cast(Engine, engine), line, Account(job, as_json=False), PROMPT, as_json=False, quiet=False)
        assert engine.asked == [terminals[1] and terminals[2]]
        assert ("a guess" in streams.pty.received.decode()) == engine.asked[0]


def test_text_and_status_on_two_terminals_do_not_touch(job: Prepared) -> None:
    with Pty(60, 10) as one, Pty(60, 10) as other, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TERM", "xterm")
        with redirect_stdout(one.stream), redirect_stderr(other.stream), StatusLine() as line:
            line.say("starting")
            generate(
                cast(Engine, RecordedEngine(PIECES)),
                line,
                Account(job, as_json=False),
                PROMPT,
                as_json=False,
                quiet=True,
            )
        one.take()
        other.take()
        assert one.received == b"Once upon a time\r\n"
        assert b"starting" in other.received
        assert b"guess" not in other.received
        assert other.screen.text() == ""


def test_quiet_leaves_standard_error_alone(job: Prepared, tmp_path: Path) -> None:
    streams = Streams(tmp_path, terminals=(True, False, True))
    with streams.pty, streams.in_place(), StatusLine(draws=False) as line:
        line.say("starting")
        generate(
            cast(Engine, RecordedEngine(PIECES)), line, Account(job, as_json=False), PROMPT, as_json=False, quiet=True
        )
    assert streams.pty.received == b""
    assert streams.written(1) == "Once upon a time\n"


def broken_run(job: Prepared, error: BaseException, *, as_json: bool) -> tuple[str, RecordedEngine]:
    """What is on standard output once a run has broken, and its engine."""
    engine = RecordedEngine(PIECES, error=error)
    account = Account(job, as_json=as_json)
    with redirect_stdout(io.StringIO()) as out, pytest.raises(type(error)), account.guarded(), StatusLine() as line:
        generate(cast(Engine, engine), line, account, PROMPT, as_json=as_json, quiet=False)
    return out.getvalue(), engine


def test_a_run_that_breaks_leaves_the_text_on_standard_output(job: Prepared) -> None:
    assert broken_run(job, ActorFailure("the actor died"), as_json=False)[0] == "Once upon a time\n"


@pytest.mark.parametrize(
    ("error", "reason", "message"),
    [
        (ActorFailure("the actor died"), "error", "the actor died"),
        (ValueError(), "error", "ValueError"),
        (KeyboardInterrupt(), "interrupted", "interrupted"),
        (SystemExit(143), "interrupted", "interrupted"),
    ],
    ids=repr,
)
def test_a_run_that_breaks_ends_with_an_object_that_has_all_so_far(
    job: Prepared, error: BaseException, reason: str, message: str
) -> None:
    (line,) = broken_run(job, error, as_json=True)[0].splitlines()
    report = json.loads(line)
    assert (report["finish_reason"], report["error"]) == (reason, message)
    assert (report["text"], report["token_ids"]) == ("Once upon a time", [1, 2, 3, 4])
    assert report["stats"]["new_tokens"] == 4
    assert report["stats"]["memory_cap_bytes"] == job.memory.cap_bytes
    assert report["target_path"] == str(job.target.path)


def test_a_start_that_breaks_ends_with_an_object_too(job: Prepared) -> None:
    account = Account(job, as_json=True)
    with redirect_stdout(io.StringIO()) as out, pytest.raises(ActorFailure), account.guarded(), account.guarded():
        raise ActorFailure("the loader failed")
    report = json.loads(out.getvalue())
    assert (report["finish_reason"], report["text"], report["error"]) == ("error", "", "the loader failed")


def test_once_nobody_reads_a_run_ends_at_once_and_quietly(job: Prepared) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    engine, stdout = RecordedEngine(PIECES), os.fdopen(writer, "w")
    with redirect_stdout(stdout), pytest.raises(SystemExit) as ended, StatusLine() as line:
        generate(cast(Engine, engine), line, Account(job, as_json=False), PROMPT, as_json=False, quiet=False)
    stdout.close()  # what is left in its buffer does no harm
    assert ended.value.code == 141
    assert engine.has_ended
    assert engine.stats.new_tokens == 2


def test_a_full_disk_is_one_clear_error(job: Prepared) -> None:
    engine, message = RecordedEngine(PIECES), "standard output: No space left"
    with (
        Path("/dev/full").open("w") as stdout,
        redirect_stdout(stdout),
        pytest.raises(StorageError, match=message),
        StatusLine() as line,
    ):
        generate(cast(Engine, engine), line, Account(job, as_json=False), PROMPT, as_json=False, quiet=False)
    assert engine.has_ended


@pytest.mark.parametrize("options", [(), ("--json",)], ids=["table", "json"])
def test_a_command_that_starts_nothing_meets_a_full_disk_and_a_closed_pipe_alike(
    job: Prepared, options: tuple[str, ...]
) -> None:
    command = [*LLMCAD, "plan", "--draft", "none", "--target", str(job.target.path), *options]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=DEADLINE_S)
    assert (done.returncode, done.stderr) == (2, "llmcad: cannot write to standard output: No space left on device\n")
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=DEADLINE_S)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_what_an_encoding_lacks_is_a_question_mark() -> None:
    with redirect_stdout(io.TextIOWrapper(io.BytesIO(), encoding="ascii")) as stdout:
        output.write("naïve 漢\n")
    stdout.seek(0)
    assert stdout.read() == "na?ve ?\n"


def test_a_closed_standard_output_is_an_error(job: Prepared) -> None:
    command = [*LLMCAD, "plan", "--draft", "none", "--target", str(job.target.path)]
    done = subprocess.run(
        ["bash", "-c", '"$@" >&-', "-", *command], stderr=subprocess.PIPE, text=True, timeout=DEADLINE_S
    )
    assert (done.returncode, done.stderr) == (2, "llmcad: cannot write to standard output: it is closed\n")


def test_a_closed_standard_error_costs_nothing_but_what_is_said_there(job: Prepared) -> None:
    with redirect_stdout(io.StringIO()) as out, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", None)  # as Python has it where file 2 is closed
        with StatusLine() as line:
            line.warn("nobody hears this")
            account = Account(job, as_json=False)
            generate(cast(Engine, RecordedEngine(PIECES)), line, account, PROMPT, as_json=False, quiet=False)
    assert out.getvalue() == "Once upon a time\n"


class Run:
    """A shell command at a terminal of its own."""

    def __init__(self, script: str, *words: str) -> None:
        self.pty = Pty(100, 40)
        self._process = subprocess.Popen(
            ["bash", "-c", script, "-", *words],
            stdin=self.pty.slave,
            stdout=self.pty.slave,
            stderr=self.pty.slave,
            start_new_session=True,
            env=os.environ | {"TERM": "xterm-256color"},
        )

    def wait_for(self, pattern: str) -> None:
        """Until the terminal has got this; fails if the command ends before."""
        deadline = time.monotonic() + DEADLINE_S
        while not re.search(pattern, self.pty.received.decode(errors="replace")):
            assert self._process.poll() is None, self.pty.screen.text()
            assert time.monotonic() < deadline, self.pty.screen.text()
            self.pty.take(0.1)

    def end(self) -> int:
        """Its exit code."""
        deadline = time.monotonic() + DEADLINE_S
        while self._process.poll() is None:
            assert time.monotonic() < deadline, self.pty.screen.text()
            self.pty.take(0.1)
        self.pty.take()
        return self._process.returncode

    def kill_one(self, name: str) -> None:
        """End one process below the command, as a fault would."""
        below = psutil.Process(self._process.pid).children(recursive=True)
        next(process for process in below if process.cmdline()[:1] and name in process.cmdline()[0]).kill()


def test_an_actor_that_dies_in_the_middle_costs_no_accepted_text(tmp_path: Path) -> None:
    settings = slow(tmp_path).config
    names = ("target", "draft", "memory", "max_nodes", "chunk_bytes", "extent_bytes", "read_limit")
    file, out = tmp_path / "settings.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump({name: getattr(settings, name) for name in names}))
    command = (*LLMCAD, "generate", "--config", str(file), "--json", "--max-new-tokens", "400", PROMPT)
    run = Run('out=$1; shift; "$@" > "$out"', str(out), *command)
    with run.pty:
        run.wait_for(r"\d tokens/s \|")
        run.kill_one("VerifierActor")
        assert run.end() == 1, run.pty.screen.text()
        assert "llmcad: " in run.pty.screen.text()
        assert "Traceback" not in run.pty.screen.text()
    report = json.loads(out.read_text())  # and nothing of Ray's beside it
    assert report["finish_reason"] == "error"
    assert "died" in report["error"]
    assert 0 < len(report["token_ids"]) == report["stats"]["new_tokens"]
    assert report["text"]


def test_a_pipe_that_is_closed_ends_a_run_quietly(job: Prepared) -> None:
    words = ("generate", "--target", str(job.target.path), "--draft", "none", "--memory", "4GB", "--quiet", PROMPT)
    run = Run('"$@" | head -c 5 >/dev/null; echo "ended with ${PIPESTATUS[0]}"', *LLMCAD, *words)
    with run.pty:
        assert run.end() == 0
        assert run.pty.received == b"ended with 141\r\n"


def test_the_demo_shows_prompt_figures_and_verdict_beside_its_text(tmp_path: Path) -> None:
    options = ("--size", "80MB", "--memory", "1.3GB", "--max-new-tokens", "12", "--plain-tokens", "3")
    script = 'out=$1; shift; LLMCAD_CACHE="$out.cache" "$@" > "$out"'
    run = Run(script, str(tmp_path / "out"), *LLMCAD, "demo", "--prompt", "def read_lines(path):\n    ", *options)
    with run.pty:
        assert run.end() == 0, run.pty.screen.text()
        shown = run.pty.screen.text()
    assert shown.startswith("llmcad: the demo's target is made once")
    assert "\ndef read_lines(path):\n" in shown
    assert "tokens per pass" in shown
    assert re.search(r"Both texts are the same \(3 tokens compared\), and speculation is \d+\.\d times", shown)
    text = (tmp_path / "out").read_text()
    assert text.strip()
    assert "\x1b" not in text
    assert "tokens per pass" not in text
    assert not text.startswith("def read_lines")


@pytest.mark.parametrize("undrafted", [2, 4])
def test_a_draft_that_was_left_out_of_most_passes_is_told_of(undrafted: int) -> None:
    prepared = make_job(bundled_target(), bundled_draft())
    stats = replace(Stats(), target_passes=4, undrafted_passes=undrafted)
    freed = format_size(prepared.draft_bytes)
    told = [f"the draft did not pay: 4 of 4 passes ran without it; --draft none would free {freed} for the target"]
    assert idle_draft(prepared, stats) == (told if undrafted == 4 else [])
    assert idle_draft(prepared.without_draft(), stats) == []


def test_a_draft_that_was_ended_is_told_of() -> None:
    prepared = make_job(bundled_target(), bundled_draft())
    (told,) = idle_draft(prepared, replace(Stats(), target_passes=99, draft_ended=True))
    assert told == (
        "the draft was ended: hardly a guess of it was right; "
        f"its {format_size(prepared.draft_bytes)} hold layers of the target instead"
    )
