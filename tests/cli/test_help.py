"""Help, versions and completion come without what is slow to import, and tell what there is."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llmcad_actors.cli.commands import app
from llmcad_actors.cli.examples import EXAMPLES
from llmcad_actors.cli.options import CHOOSING, PANELS
from llmcad_actors.config import EngineConfig
from llmcad_actors.machine.versions import summary

COMMANDS = ("generate", "plan", "demo", "doctor", "models", "clean", "convert", "trace")
HEAVY = {"torch", "transformers", "ray", "numpy", "tokenizers", "msgpack", "huggingface_hub"}


def shown(*words: str, columns: int = 100) -> str:
    done = CliRunner().invoke(app, [*words], env={"COLUMNS": str(columns)})
    assert done.exit_code == 0, done.output
    return done.stdout


def joined(text: str) -> str:
    """Without the frame, on one line."""
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_short_help_with_two_examples(command: str) -> None:
    text = shown(command, "-h")
    assert text == shown(command, "--help")
    assert len(EXAMPLES[command]) == 2
    for example in EXAMPLES[command]:
        assert example in joined(text)


@pytest.mark.parametrize("columns", [60, 80, 100, 200])
def test_no_line_of_help_is_wider_than_the_terminal(columns: int) -> None:
    for command in ((), *((name,) for name in COMMANDS)):
        assert max(map(len, shown(*command, "-h", columns=columns).splitlines())) <= columns


def test_the_options_of_a_job_stand_in_groups_in_the_same_order() -> None:
    for command in ("generate", "plan", "batch"):
        found = re.findall("|".join(map(re.escape, PANELS)), "\n".join(re.findall(r"╭─ (.*?) ─", shown(command, "-h"))))
        assert found == [panel for panel in PANELS if command != "plan" or panel != CHOOSING]


def test_defaults_are_shown_and_are_the_engines() -> None:
    text, config = joined(shown("generate", "-h", columns=200)), EngineConfig(target="x")
    for name in ("dtype", "builder", "fallback", "depth", "alpha", "alpha_update", "threshold"):
        about = text.split(f"--{name.replace('_', '-')} ", 1)[1].split(" --", 1)[0]
        assert f"[default: {getattr(config, name)}]" in about
    assert "[default: 1,1,3,1,1,1,1,1]" in text
    assert "[default: 128]" in text  # --max-new-tokens


def test_the_examples_are_commands_that_exist(tmp_path: Path) -> None:
    """Each of their options is one of the command's."""
    for example in (example for examples in EXAMPLES.values() for example in examples):
        command, *words = example.removeprefix("llmcad ").split()
        help_ = shown(command, "-h")
        assert all(re.search(rf"{word}\b", help_) for word in words if word.startswith("--")), example


def test_the_version_names_what_it_runs_on() -> None:
    assert shown("--version") == f"{summary()}\n"
    assert re.match(
        r"llmcad \d+\.\d+\.\d+ \(Python 3\.\d+\.\d+, ray .*, torch .*, transformers .*\)\n", summary() + "\n"
    )


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["generate", "-h"], ["plan", "--bogus"]], ids=str)
def test_help_and_versions_import_nothing_heavy(words: list[str]) -> None:
    script = (
        "import json, sys; from llmcad_actors.cli.commands import app; "
        "app(sys.argv[1:], standalone_mode=False) if '--bogus' not in sys.argv else None; "
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not HEAVY & set(json.loads(done.stderr.splitlines()[-1]))


@pytest.mark.parametrize(
    ("typed", "offered"), [("llmcad ge", {"generate"}), ("llmcad plan --mem", {"--memory"}), ("llmcad cl", {"clean"})]
)
def test_the_shell_completes(typed: str, offered: set[str]) -> None:
    words = {"COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1), "_LLMCAD_COMPLETE": "complete_bash"}
    script = "import sys; sys.argv = ['llmcad']; from llmcad_actors.cli.commands import app; app(prog_name='llmcad')"
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | words, capture_output=True, text=True, timeout=60
    )
    assert set(done.stdout.split()) == offered, done.stderr


def test_the_options_for_completion_stand_apart() -> None:
    text = shown("-h")
    assert text.index("Completion in the shell") < text.index("--install-completion")
