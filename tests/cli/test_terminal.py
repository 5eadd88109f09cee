"""The text on a user's terminal stays as it was printed, whatever is drawn around it. On real pseudo-terminals."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llmcad_actors.cli.columns import Column, fit, visible, widths
from llmcad_actors.cli.terminal import Terminal
from tests.screens import Pty

ZWJ_FAMILY, FLAG, HEART, THUMB = "👨\u200d👩\u200d👧", "🇩🇪", "❤\ufe0f", "👍🏽"
WORDS = (
    "a",
    "word",
    " ",
    " and more ",
    "漢字",
    "\uff0c",
    "\uff46\uff55",
    "한글",
    "é",
    "e\u0301",
    "😀",
    "\t",
    "\n",
    "\n\n",
    "“”—…",
)
UNSURE = (ZWJ_FAMILY, FLAG, HEART, THUMB, "\u200b", "नमस्ते", "1\ufe0f\u20e3")


@dataclass(frozen=True)
class Write:
    text: str


@dataclass(frozen=True)
class Guess:
    text: str


@dataclass(frozen=True)
class Say:
    status: str


@dataclass(frozen=True)
class Resize:
    width: int


Action = Write | Guess | Say | Resize
texts = st.lists(st.sampled_from((*WORDS, *WORDS, *UNSURE)), max_size=12).map("".join)
lines_of_any_length = st.integers(0, 130).map(lambda n: ("0123456789" * 13)[:n])
drawings = st.one_of(
    (texts | lines_of_any_length).map(Write),
    (texts | lines_of_any_length).map(Guess),
    texts.map(lambda text: Say(f"status {text}")),
)


@contextmanager
def on_one_terminal(pty: Pty) -> Iterator[Terminal]:
    """Standard output and standard error both lead to it."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(pty.stream), redirect_stderr(pty.stream):
        patch.setenv("TERM", "xterm-256color")
        patch.delenv("NO_COLOR", raising=False)
        yield Terminal()


def do(action: Action, terminal: Terminal, ours: Pty, plain: Pty) -> None:
    """The action on our terminal; of it on the other what a program would do that draws nothing."""
    match action:
        case Write(text):
            terminal.write(text)
            plain.stream.write(visible(text))
            plain.stream.flush()
        case Guess(text):
            terminal.guess(text)
        case Say(status):
            terminal.say(status)
        case Resize(width):
            ours.resize(width)
            plain.resize(width)
            terminal.say("status after a change of size")
    ours.take()
    plain.take()


def assert_text_is_as_if_nothing_was_drawn(actions: list[Action], width: int, height: int) -> None:
    with ExitStack() as stack:
        ours, plain = (stack.enter_context(Pty(width, height)) for _ in range(2))
        with on_one_terminal(ours) as terminal:
            for action in actions:
                do(action, terminal, ours, plain)
                assert ours.screen.until_cursor() == plain.screen.until_cursor(), action
            terminal.end()
            ours.take()
        assert ours.screen.text() == plain.screen.text()
        assert ours.screen.cursor.x == 0


@given(st.lists(drawings, max_size=14), st.integers(1, 30), st.integers(1, 6))
@example([Say("status"), Write("0123456789"), Guess("more"), Say("other"), Write("x")], 10, 3)  # a line just filled
@example([Say("status"), Write("漢字漢字漢"), Say("other"), Write("字")], 10, 3)
@example([Write("01234567漢"), Say("status"), Write("\n字")], 10, 3)
@example([Write("0123456789"), Say("status"), Write("\n"), Say("status")], 10, 2)
@example([Write("012345678漢"), Say("status"), Write("字")], 10, 3)  # half a character of room
@example([Write(f"01234{ZWJ_FAMILY}"), Guess("more"), Say("status"), Write("9")], 10, 3)
@example([Write("0123456789\t"), Say("status"), Write("x")], 10, 3)
@example([Write("012345678e\u0301"), Say("status"), Write("x")], 10, 3)
@example([Write("x" * 900), Guess("more"), Say("status"), Write("x" * 900)], 25, 4)  # a line taller than the screen
@example([Write("x\n" * 50), Guess("more"), Say("status"), Write("x\n" * 50)], 25, 4)
def test_nothing_that_is_drawn_changes_the_text(actions: list[Action], width: int, height: int) -> None:
    assert_text_is_as_if_nothing_was_drawn(actions, width, height)


narrow_texts = st.lists(st.sampled_from(("a", "word ", "é", "\n", "0123456789")), max_size=8).map("".join)


@given(
    st.lists(st.one_of(narrow_texts.map(Write), narrow_texts.map(Guess), st.integers(8, 40).map(Resize)), max_size=14),
    st.integers(10, 40),
)
@example([Write("0123456789abcde"), Guess("more"), Resize(12), Write("fgh"), Resize(30), Write("\nlast")], 20)
@example([Resize(10), Write("0123456789"), Guess("more"), Write("x")], 20)  # a line that is full by the new width
def test_a_terminal_that_changes_its_size_keeps_the_text(actions: list[Action], width: int) -> None:
    assert_text_is_as_if_nothing_was_drawn(actions, width, 5)


@given(st.lists(texts | lines_of_any_length, max_size=8), st.integers(2, 40))
def test_the_cursor_is_where_it_may_be(pieces: list[str], width: int) -> None:
    column = Column(width)
    with Pty(width, 5) as pty:
        for piece in pieces:
            column = column.after(visible(piece))
            pty.stream.write(visible(piece))
            pty.stream.flush()
            pty.take()
            assert pty.screen.cursor.x in column.places


@given(texts, st.integers(0, 20))
def test_what_fits_is_never_wider(text: str, room: int) -> None:
    assert sum(max(widths(char)) for char in fit(text, room)) <= room
    assert text.startswith(fit(text, room))


@pytest.mark.parametrize(
    ("text", "columns"), [("word", 4), ("漢字", 4), ("한글", 4), ("😀", 2), ("é", 1), ("e\u0301", 1), ("“—…”", 4)]
)
def test_what_terminals_agree_on_has_one_width(text: str, columns: int) -> None:
    assert Column(80).after(text).places == {columns}


@pytest.mark.parametrize("text", UNSURE)
def test_what_terminals_disagree_on_has_several(text: str) -> None:
    assert len(Column(80).after(text).places) > 1


def test_the_status_is_on_the_line_below_and_the_guess_behind_the_text() -> None:
    with Pty(40, 6) as pty, on_one_terminal(pty) as terminal:
        terminal.say("starting")
        pty.take()
        assert pty.screen.rows()[0] == "starting"
        terminal.write("Once upon")
        terminal.guess(" a time\nthere was")
        terminal.say("12 tokens")
        pty.take()
        assert pty.screen.rows()[:3] == ["Once upon a time", "12 tokens", ""]
        assert (pty.screen.cursor.y, pty.screen.cursor.x) == (0, 9)
        terminal.write(" the sea")
        pty.take()
        assert pty.screen.rows()[:3] == ["Once upon the sea", "12 tokens", ""]
        terminal.write("\n")
        pty.take()
        assert pty.screen.rows()[:3] == ["Once upon the sea", "12 tokens", ""]
        terminal.end()
        pty.take()
        assert pty.screen.text() == "Once upon the sea"
        assert (pty.screen.cursor.y, pty.screen.cursor.x) == (1, 0)


def test_a_status_wider_than_the_terminal_is_cut_and_never_wraps() -> None:
    with Pty(20, 6) as pty, on_one_terminal(pty) as terminal:
        terminal.write("text")
        terminal.say("漢" * 30)
        pty.take()
        assert pty.screen.rows()[:3] == ["text", "漢" * 9, ""]


def test_of_a_status_too_wide_whole_parts_are_left_out() -> None:
    with Pty(20, 6) as pty, on_one_terminal(pty) as terminal:
        terminal.say("5.3 tokens/s | 12 s | 4.2 tokens a pass | 1800 MB/s")
        pty.take()
        assert pty.screen.text() == "5.3 tokens/s | 12 s"
        terminal.say("pinning layers of a model ...")
        pty.take()
        assert pty.screen.text() == "pinning layers of a"


def test_the_status_stays_below_where_a_line_has_just_been_filled() -> None:
    with Pty(20, 6) as pty, on_one_terminal(pty) as terminal:
        terminal.say("status")
        terminal.write("0123456789" * 2)
        pty.take()
        assert pty.screen.rows()[:3] == ["0123456789" * 2, "status", ""]
        terminal.write("next")
        pty.take()
        assert pty.screen.rows()[:4] == ["0123456789" * 2, "next", "status", ""]


def test_what_the_text_goes_on_from_stands_right_before_it_and_is_not_on_standard_output() -> None:
    with Pty(40, 6) as pty, on_one_terminal(pty) as terminal:
        terminal.lead("def f(x):\n    ")
        terminal.write("return x")
        terminal.end()
        pty.take()
        assert pty.screen.text() == "def f(x):\n    return x"


def test_a_warning_breaks_no_line_of_the_text_and_is_shown_at_once() -> None:
    with Pty(30, 8) as pty, on_one_terminal(pty) as terminal:
        terminal.say("status")
        terminal.write("one line")
        terminal.warn("too much\nmemory")
        pty.take()
        assert pty.screen.rows()[:2] == ["one line", "too much memory | status"]
        terminal.write(" ends\n")
        pty.take()
        assert pty.screen.rows()[:3] == ["one line ends", "too much memory", "status"]
        terminal.write("the next")
        terminal.warn("more")
        terminal.end()
        pty.take()
        assert pty.screen.text() == "one line ends\ntoo much memory\nthe next\nmore"


@pytest.mark.parametrize("draws", [True, False])
def test_a_warning_is_a_plain_line_where_nothing_is_drawn(draws: bool, tmp_path: Path) -> None:
    with Pty(30, 8) as pty, (tmp_path / "err").open("w") as err, redirect_stdout(pty.stream), redirect_stderr(err):
        terminal = Terminal(draws=draws)
        terminal.write("text")
        terminal.warn("too much memory")
        assert (tmp_path / "err").read_text() == "too much memory\n"
        terminal.end()
        pty.take()
        assert pty.received == b"text\r\n"


def test_a_warning_waits_for_the_end_of_a_line_where_nothing_is_drawn_beside_the_text() -> None:
    with Pty(30, 8) as pty, on_one_terminal(pty):
        terminal = Terminal(draws=False)
        terminal.write("text")
        terminal.warn("too much memory")
        terminal.write(" ends\n")
        pty.take()
        assert pty.received == b"text ends\r\ntoo much memory\r\n"


def test_control_characters_of_a_text_do_not_steer_the_terminal() -> None:
    with Pty(40, 6) as pty, on_one_terminal(pty) as terminal:
        terminal.write("one\r\ntwo\x1b[2J\x07\x9b3\x7f\x08")
        terminal.end()
        pty.take()
        assert pty.screen.text() == "one\ntwo␛[2J␇�3␡␈"


@pytest.mark.parametrize(
    ("variables", "has_status", "has_guess"),
    [({"TERM": "dumb"}, False, False), ({"NO_COLOR": "1"}, True, False), ({"TERM": "vt100"}, True, True)],
    ids=str,
)
def test_a_terminal_is_asked_no_more_than_it_can(
    variables: dict[str, str], has_status: bool, has_guess: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Pty(40, 6) as pty, on_one_terminal(pty):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        terminal = Terminal()
        terminal.write("text")
        terminal.guess(" guess")
        terminal.say("status")
        pty.take()
        assert pty.screen.rows()[:2] == ["text guess" if has_guess else "text", "status" if has_status else ""]
        assert (b"\x1b[2m" in pty.received) == has_guess
        terminal.end()
        pty.take()
        assert pty.screen.text() == "text"


def test_a_terminal_that_has_gone_away_is_not_drawn_on_any_more() -> None:
    pty = Pty(40, 6)
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(pty.stream):
        patch.setenv("TERM", "xterm")
        terminal = Terminal()
        terminal.say("status")
        assert terminal.draws
        os.close(pty._master)
        terminal.say("other")
        terminal.end()
        assert not terminal.draws
        with suppress(OSError):
            pty.stream.close()
