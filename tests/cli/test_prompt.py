"""A prompt that cannot be used is refused in one line before anything starts; notices say what has no effect."""

import os
import pty
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from llmcad_actors import engine
from llmcad_actors.cli.commands import app
from llmcad_actors.config import EngineConfig
from llmcad_actors.core.checks import check_text
from llmcad_actors.errors import ConfigError
from llmcad_actors.plan.job import Prepared
from llmcad_actors.plan.prepare import prepare
from llmcad_actors.plan.prompt import check_prompt, room_behind
from tests.tiny import tiny_llama, with_template

CONTEXT = 512


class Started(Exception):
    """An engine would have been started."""


@pytest.fixture(autouse=True)
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order matters here, not the engine: what comes to a start raises."""

    def start(*_: Any, **__: Any) -> None:
        raise Started

    monkeypatch.setattr(engine.Engine, "start", start)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each byte is a token."""
    return tiny_llama(tmp_path_factory.mktemp("models") / "tiny", layers=1, context=CONTEXT)


def job(model: Path, **settings: Any) -> Prepared:
    return prepare(EngineConfig(target=str(model), memory="2GB", **settings))


def generate(model: Path, *words: str, stdin: bytes = b"") -> Any:
    options = ["--target", str(model), "--draft", "none", "--memory", "2GB"]
    return CliRunner().invoke(app, ["generate", *options, *words], input=stdin)


def assert_refused(done: Any, message: str) -> None:
    """One line, exit code 2, nothing started."""
    assert (done.exit_code, done.stdout) == (2, ""), done.exception
    (line,) = done.stderr.splitlines()
    assert re.search(message, line), line


@pytest.mark.parametrize("length", [CONTEXT, CONTEXT + 1, 5000])
def test_a_prompt_too_long_is_refused_before_the_start_with_the_models_limit(model: Path, length: int) -> None:
    message = (
        rf"the prompt has {length} tokens, and tiny takes at most 512 in all; shorten it by at least {length - 511}$"
    )
    assert_refused(generate(model, "x" * length), message)
    assert_refused(generate(model, stdin=b"x" * length), message)
    assert "max-context" not in generate(model, "x" * length).stderr  # it cannot help


def test_a_larger_context_is_named_only_where_the_model_has_it(model: Path) -> None:
    done = generate(model, "--max-context", "100", "x" * 100)
    assert_refused(done, r"100 tokens, and tiny .* 512 in all \(100 are planned for\); give --max-context 101 ")
    assert_refused(generate(model, "--max-context", "100", "x" * 512), r"512 tokens.*; shorten it by at least 1$")


def test_the_longest_prompt_that_fits_is_not_refused(model: Path) -> None:
    done = generate(model, "--max-new-tokens", "1", "x" * (CONTEXT - 1))
    assert isinstance(done.exception, Started)
    assert done.stderr == ""


def test_tokens_that_will_not_fit_are_noticed_and_the_run_goes_on(model: Path) -> None:
    done = generate(model, "--max-new-tokens", "500", "x" * 100)
    assert isinstance(done.exception, Started)
    (line,) = done.stderr.splitlines()
    assert "there is room for 412 new tokens, not for 500: the prompt has 100" in line
    assert "max-context" not in line
    (line,) = check_prompt(job(model, max_context=200), "x" * 100, 500)
    assert line.endswith("; give --max-context 512 (max_context=512)")


def test_a_short_prompt_is_not_counted(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer of a large vocabulary takes hundreds of megabytes."""
    monkeypatch.setattr("llmcad_actors.text.tokenizer.read_tokenizer", pytest.fail)
    assert check_prompt(job(model), "x" * 100, 128) == ()


def test_where_transformers_has_a_say_only_what_is_much_too_long_is_refused_at_once(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path / "tiny", layers=1, context=CONTEXT)
    prepared = job(with_template(path, None, tokenizer_class="GPT2Tokenizer"))
    assert check_prompt(prepared, "x" * (CONTEXT + 5), 1) == ()  # the engine will tell
    with pytest.raises(ConfigError, match="the prompt has 600 tokens"):
        check_prompt(prepared, "x" * 600, 1)
    (line,) = check_prompt(prepared, "x" * 400, 200)
    assert "room for about 112 new tokens" in line


def test_the_chat_template_counts(tmp_path: Path) -> None:
    path = with_template(tiny_llama(tmp_path / "tiny", layers=1, context=CONTEXT), "{{ messages[0].content * 2 }}")
    assert check_prompt(job(path), "x" * 256, 1) == ()
    with pytest.raises(ConfigError, match="the prompt has 512 tokens"):
        check_prompt(job(path), "x" * 256, 1, chat=True)


def test_an_encoders_prompt_and_the_output_have_a_context_each(model: Path) -> None:
    class EncoderDecoder(Prepared):
        is_encoder_decoder = True

    prepared = job(model, max_context=200)
    both = EncoderDecoder(**{name: getattr(prepared, name) for name in prepared.__dataclass_fields__})
    assert room_behind(both, 200) == 199
    with pytest.raises(ConfigError, match=r"at most 512 for prompt and output each \(200 are .*--max-context 300 "):
        room_behind(both, 300)


@pytest.mark.parametrize(
    ("words", "stdin", "message"),
    [
        (["ab\udcffc"], b"", "the prompt is not UTF-8: byte 0xff at offset 2 "),
        (["日\udce9"], b"", "the prompt is not UTF-8: byte 0xe9 at offset 3 "),
        ([], b"caf\xe9\n", r"the prompt \(standard input\) is not UTF-8: byte 0xe9 at offset 3 .*iconv"),
        (["-"], "x".encode("utf-16"), "not UTF-8: byte 0xff at offset 0 "),
        (["--stop", "\udc80", "x"], b"", "--stop is not UTF-8: byte 0x80 at offset 0 "),
        (["--target", "/no\udcff", "x"], b"", "--target is not UTF-8: byte 0xff at offset 3 "),
        (["--dtype", "\udcff", "x"], b"", "--dtype is not UTF-8"),
    ],
    ids=repr,
)
def test_bytes_that_are_not_utf8_are_refused_in_one_line(
    model: Path, words: Sequence[str], stdin: bytes, message: str
) -> None:
    assert_refused(generate(model, *words, stdin=stdin), message)


def test_real_bytes_of_the_shell_are_refused_too(model: Path) -> None:
    command = [sys.executable, "-m", "llmcad_actors.cli", "generate", "--target", str(model)]
    done = subprocess.run([*command, b"caf\xe9"], capture_output=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith(b"llmcad: the prompt is not UTF-8: byte 0xe9 at offset 3 ")
    assert done.stderr.count(b"\n") == 1
    closed = subprocess.run(["sh", "-c", 'exec "$@" <&-', "sh", *command, "--draft", "none"], capture_output=True)
    assert closed.returncode == 2
    assert b"there is no standard input" in closed.stderr
    assert b"Traceback" not in closed.stderr


def test_half_a_pair_from_python_is_no_text() -> None:
    with pytest.raises(ConfigError, match=r"it is not text: U\+D83D at character 1 is half of a pair"):
        check_text("x\ud83d", "it")
    check_text("x\N{GRINNING FACE}\0", "it")


def test_lines_of_standard_input_end_alike(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def look(job: Prepared, text: str, *_: Any, **__: Any) -> tuple[str, ...]:
        seen.append(text)
        return ()

    monkeypatch.setattr("llmcad_actors.cli.commands.check_prompt", look)
    generate(model, stdin=b"one\r\ntwo\nthr\xc3\xa9e")
    assert seen == ["one\ntwo\nthr\N{LATIN SMALL LETTER E WITH ACUTE}e"]


def test_standard_input_without_an_end_is_given_up_on(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmcad_actors.plan.prompt.MOST_BYTES", 2 << 20)
    assert_refused(generate(model, stdin=bytes(3 << 20)), "standard input has more than 2 MiB")


@pytest.mark.parametrize(
    "text", ["-x", "- item one", "-1, -2", "--- a/file", "-hello", "-h?", "--json is nice", "--x=1"]
)
def test_a_prompt_that_looks_like_an_option_is_shown_the_way(model: Path, text: str) -> None:
    done = generate(model, text)
    assert (done.exit_code, done.stdout) == (2, "")
    words = " ".join(done.stderr.replace("│", " ").split())
    assert "A text that begins with - goes behind --, as in: llmcad generate -- '-1, -2, -3'" in words
    assert isinstance(generate(model, "--", text).exception, Started)


def test_a_misspelt_option_is_answered_with_the_right_one(model: Path) -> None:
    done = generate(model, "--memroy", "1GB", "x")
    assert done.exit_code == 2
    assert "--memory" in done.stderr
    assert "goes behind" not in done.stderr


def test_at_a_terminal_it_says_that_it_reads_standard_input(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "tiny", layers=1)
    file = model / "config.json"
    file.write_text(file.read_text().replace('"bos_token_id": 0', '"bos_token_id": null'))
    main, child = pty.openpty()
    command = [sys.executable, "-m", "llmcad_actors.cli", "generate", "--target", str(model), "--draft", "none"]
    os.write(main, b"\x04")  # Ctrl-D
    done = subprocess.run(command, stdin=child, capture_output=True, timeout=120)
    os.close(child)
    os.close(main)
    first, *rest = done.stderr.splitlines()
    assert first == b"llmcad: reading the prompt from standard input; end it with Ctrl-D"
    assert b"the prompt is empty" in b" ".join(rest)  # and so it has been read to its end
    assert (done.returncode, done.stdout) == (2, b"")


def plan(*words: str) -> Any:
    done = CliRunner().invoke(app, ["plan", "--memory", "2GB", "--json", *words])
    assert done.exit_code == 0, done.output
    return done


def test_a_target_without_a_draft_decodes_plainly_and_says_so(model: Path) -> None:
    (line,) = plan("--target", str(model)).stderr.splitlines()
    assert re.match(r"llmcad: no draft for tiny: it decodes plainly, one token a pass; .*--draft none", line)
    assert plan("--target", str(model), "--draft", "none").stderr == ""
    assert plan("--target", str(model), "--draft", str(model)).stderr == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--depth 9", "--depth has no effect: it belongs to --fallback fixed-depth, and the fallback is marginal"),
        ("--widths 1,2 --fallback fixed-depth", "--widths has no effect: it belongs to --fallback fixed-tree, and"),
        ("--alpha 0.1", "--alpha has no effect: it belongs to --fallback adaptive,"),
        ("--alpha-update average", "--alpha-update has no effect: it belongs to --fallback adaptive,"),
        ("--threshold 0.1 --fallback adaptive", "--threshold has no effect: it belongs to --fallback token-confidence"),
        ("--builder pacer --fallback fixed-tree", "--builder has no effect: it belongs to --fallback marginal or"),
        ("--no-sharpen --builder pacer", "--no-sharpen has no effect: it belongs to --builder best-first, and"),
        ("--sharpen --fallback fixed-depth", "--sharpen has no effect: it belongs to --fallback marginal or"),
    ],
    ids=lambda value: value if value.startswith("--") and "has" not in value else "",
)
def test_a_setting_without_effect_is_noticed(model: Path, words: str, message: str) -> None:
    (line,) = plan("--target", str(model), "--draft", str(model), *words.split()).stderr.splitlines()
    assert line.startswith(f"llmcad: {message}")


@pytest.mark.parametrize(
    "words",
    [
        "--depth 9 --fallback fixed-depth",
        "--widths 1,2 --fallback fixed-tree",
        "--alpha 0.1 --fallback adaptive",
        "--threshold 0.1 --fallback token-confidence",
        *("--builder pacer", "--no-sharpen", "--no-provisional"),
    ],
)
def test_nothing_is_said_where_it_has_one(model: Path, words: str) -> None:
    assert plan("--target", str(model), "--draft", str(model), *words.split()).stderr == ""


def test_without_a_draft_no_setting_of_drafting_has_an_effect(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("draft: none\nalpha: 0.2\n")
    lines = plan("--target", str(model), "--config", str(file), "--no-provisional").stderr.splitlines()
    assert [line.split(" has no effect")[0] for line in lines] == ["llmcad: --alpha", "llmcad: --no-provisional"]


def test_more_threads_than_cores_are_noticed(model: Path) -> None:
    (line,) = plan("--target", str(model), "--draft", "none", "--threads", "1000").stderr.splitlines()
    assert "1000 threads on" in line
    assert plan("--target", str(model), "--draft", "none", "--threads", "1").stderr == ""
