"""A small file is read whole when it is one, and otherwise refused in time and in little memory."""

import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmcad_actors.errors import CheckpointError, TokenizerError
from llmcad_actors.storage.small_file import CONFIG_BYTES, DEEPEST, parse_json, read_object, read_small, read_text

MB = 1_000_000


def sparse(file: Path) -> None:
    with file.open("wb") as stream:
        stream.truncate(3000 * MB)


PLACES: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (lambda file: None, "No such file"),
    "a folder": (Path.mkdir, "Is a directory"),
    "a pipe without a writer": (os.mkfifo, "is not a regular file"),
    "an endless device": (lambda file: file.symlink_to("/dev/zero"), "is not a regular file"),
    "a link to itself": (lambda file: file.symlink_to(file), "Too many levels of symbolic links"),
    "3 GB": (sparse, r"has 3,000,000,000 bytes, and such a file has at most 4,000,000"),
}
CONTENTS = {
    "not UTF-8": (b'{"a": "\xff"}', "cannot be read as JSON: 'utf-8' codec"),
    "half a document": (b'{"a": ', "cannot be read as JSON: Expecting value"),
    "a list": (b"[]", "is not a JSON object"),
    "a number": (b"3", "is not a JSON object"),
    "deep lists": (b"[" * 100_000, "nested more than 100 levels deep"),
    "deep objects": (b'{"a":' * 100_000, "nested more than 100 levels deep"),
    "deep enough for Python": (b'{"a":' + b"[" * 150 + b"]" * 150 + b"}", "nested more than 100 levels deep"),
    "5000 digits": (b'{"a": ' + b"1" * 5000 + b"}", "cannot be read as JSON: Exceeds the limit"),
    "brackets": (b'{"a": [' + b"{}," * 1_000_000 + b"{}]}", "consists of brackets"),
}


@pytest.mark.parametrize("place", PLACES)
def test_what_is_no_small_file_is_refused(place: str, tmp_path: Path) -> None:
    make, message = PLACES[place]
    make(tmp_path / "x.json")
    with pytest.raises(TokenizerError, match=message):
        read_object(tmp_path / "x.json", error=TokenizerError)


@pytest.mark.parametrize("name", ["a" * 5000, "a\0b", "x.json/below"])
def test_a_name_that_cannot_be_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot read") as caught:
        read_small(tmp_path / name, 10)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("content", CONTENTS)
def test_what_is_no_document_is_refused_in_little_memory(content: str, tmp_path: Path) -> None:
    data, message = CONTENTS[content]
    (tmp_path / "x.json").write_bytes(data)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=message) as caught:
        read_object(tmp_path / "x.json")
    assert tracemalloc.get_traced_memory()[1] < 30 * MB
    tracemalloc.stop()
    assert "\n" not in str(caught.value)


def test_the_dearest_document_that_is_taken_takes_some_times_its_bytes(tmp_path: Path) -> None:
    pairs = b",".join(b'"%07d":{}' % number for number in range(CONFIG_BYTES // 13))
    (tmp_path / "x.json").write_bytes(b"{" + pairs + b"}")
    tracemalloc.start()
    read_object(tmp_path / "x.json")
    assert tracemalloc.get_traced_memory()[1] < 30 * CONFIG_BYTES
    tracemalloc.stop()


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_any_other_document_is_read_as_json_reads_it(value: object) -> None:
    assert parse_json(json.dumps(value).encode()) == value
    nested = "[" * DEEPEST + "1" + "]" * DEEPEST
    assert parse_json(nested.encode()) == json.loads(nested)


def test_text_is_utf_8(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="is not UTF-8 text"):
        read_text(tmp_path / "x", 10)
