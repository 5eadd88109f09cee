"""The files of a batch: what is wrong with a line is said before anything runs, and nothing that was done is lost."""

import json
from pathlib import Path

import pytest

from llmcad_actors.batch.files import Line, Results, read_lines
from llmcad_actors.errors import ConfigError, StorageError


def lines_of(folder: Path, *lines: str, **defaults: object) -> list[Line]:
    (folder / "in.jsonl").write_text("\n".join(lines) + "\n")
    return read_lines(folder / "in.jsonl", defaults)


def test_a_line_has_its_own_options_and_the_commands_otherwise(tmp_path: Path) -> None:
    found = lines_of(
        tmp_path,
        '{"prompt": "a", "id": "x", "max_new_tokens": 3}',
        "",
        '{"prompt": "b", "temperature": 0.5, "logit_bias": {"7": -1.5}}',
        '{"prompt": "c", "id": 17}',
        max_new_tokens=9,
    )
    assert found == [
        Line("x", "a", {"max_new_tokens": 3}),
        Line("3", "b", {"max_new_tokens": 9, "temperature": 0.5, "logit_bias": {7: -1.5}}),
        Line("17", "c", {"max_new_tokens": 9}),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[" * 10000, "line 2 is not JSON"),
        ('"a"', "line 2 is not an object with a prompt"),
        ('{"text": "a"}', "line 2 is not an object with a prompt"),
        ('{"prompt": 3}', "line 2: prompt: 3 must be text"),
        ('{"prompt": "a", "id": [1]}', r"line 2: id: \[1\] must be text or a whole number"),
        ('{"prompt": "a", "id": "first"}', "line 2: the id 'first' is that of line 1 too"),
        ('{"prompt": "a", "max_tokens": 3}', "line 2: unknown option 'max_tokens'; known: .*max_new_tokens"),
        ('{"prompt": "a", "temperature": -1}', "line 2: temperature: -1 must lie between"),
        ('{"prompt": "a", "provisional": true}', "line 2: the option 'provisional' has no meaning in a batch"),
        ('{"prompt": "a", "logit_bias": {"x": 1}}', "line 2: logit_bias: 'x' is not the id of a token"),
    ],
)
def test_a_line_that_cannot_be_run_is_named(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        lines_of(tmp_path, '{"prompt": "a", "id": "first"}', line)


def test_a_file_without_prompts_or_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"in\.jsonl holds no prompts"):
        lines_of(tmp_path, "")
    for file in (tmp_path / "missing.jsonl", tmp_path):
        with pytest.raises(ConfigError, match=r"cannot read|not a regular file"):
            read_lines(file, {})


def test_results_are_appended_and_what_was_cut_off_is_run_again(tmp_path: Path) -> None:
    out = tmp_path / "new folder" / "out.jsonl"
    with Results(out) as results:
        assert results.done == set()
        results.add({"id": "a", "text": "één\n"})
        results.add({"id": "b", "error": "the prompt is too long"})
    whole = out.read_bytes()
    out.write_bytes(whole + b'{"id": "c", "te')  # killed while it wrote
    with Results(out) as results:
        assert results.done == {"a"}  # an error is tried again
        results.add({"id": "c", "text": ""})
    assert out.read_bytes().startswith(whole)
    assert [json.loads(line)["id"] for line in out.read_text().splitlines()] == ["a", "b", "c"]


def test_a_file_of_something_else_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "notes.txt"
    out.write_text("my notes\n")
    with pytest.raises(StorageError, match=r"notes\.txt, line 1 is not a result of a batch; name another file"):
        Results(out)
    assert out.read_text() == "my notes\n"
    with pytest.raises(StorageError, match="cannot write results to"):
        Results(tmp_path)
