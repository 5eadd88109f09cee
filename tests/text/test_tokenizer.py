"""Ids as `AutoTokenizer` gives them; text as it comes is the text decoded at once; a stop string is never seen."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer

from llmcad_actors.errors import TokenizerError
from llmcad_actors.text.tokenizer import (
    Detokenizer,
    StopStrings,
    auto_tokenizer,
    check_same_tokens,
    is_plain,
    read_tokenizer,
)
from llmcad_actors.text.tokenizer_child import check_same_vocabulary, load_tokenizer
from llmcad_actors.tools.bundled import bundled_draft, bundled_target
from tests.tiny import byte_tokenizer

# Text of every kind: code, scripts of one to four bytes a character, marks that join, the special token itself.
texts = st.text(max_size=40) | st.lists(
    st.sampled_from(["def f(x):\n", "    ", "é", "日本語", "👩‍👩‍👧", "\u0301", "\ufffd", "<|endoftext|>", " ", "\r\n"]),
    max_size=12,
).map("".join)


@cache
def bundled() -> Tokenizer:
    return load_tokenizer(bundled_target()).tokenizer


@cache
def byte_level() -> Tokenizer:
    """Every token is a byte: characters are cut everywhere."""
    tokenizer: Tokenizer = byte_tokenizer().backend_tokenizer
    return tokenizer


@cache
def auto(path: Path) -> object:
    return AutoTokenizer.from_pretrained(path)


@pytest.mark.parametrize("path", [bundled_target(), bundled_draft()], ids=["target", "draft"])
@given(text=texts)
def test_ids_are_those_of_the_auto_tokenizer(path: Path, text: str) -> None:
    assert is_plain(path)
    tokenizer, reference = read_tokenizer(path), auto(path)
    assert callable(reference)
    assert tokenizer.encode(text).ids == reference(text)["input_ids"]


def test_a_class_that_may_add_something_is_left_to_transformers(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).special_tokens is None
    config = tmp_path / "tokenizer_config.json"
    settings = json.loads(config.read_text())
    for change in ({"tokenizer_class": "LlamaTokenizer"}, {"add_bos_token": True}):
        config.write_text(json.dumps(settings | change))
        assert not is_plain(tmp_path)
    handed_over = load_tokenizer(tmp_path)
    assert handed_over.tokenizer.encode("añ").ids == byte_level().encode("añ").ids
    assert handed_over.special_tokens == {"bos_token": "<|end|>", "eos_token": "<|end|>"}


def test_a_directory_without_a_usable_tokenizer_says_so(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="has no tokenizer that transformers can load"):
        auto_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match="has no tokenizer that transformers can load"):
        load_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match=r"has no tokenizer\.json"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match="cannot be read as a tokenizer"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json cannot be read as JSON"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("tokenizer", [bundled, byte_level], ids=["bundled", "bytes"])
@given(prompt=texts, text=texts, data=st.data())
def test_text_as_it_comes_is_the_text_decoded_at_once(
    tokenizer: object, prompt: str, text: str, data: st.DataObject
) -> None:
    assert callable(tokenizer)
    backend: Tokenizer = tokenizer()
    context, ids = backend.encode(prompt).ids, backend.encode(text).ids
    detokenizer = Detokenizer(backend, context)
    pieces = [detokenizer.feed(part) for part in data.draw(cuts(ids), "parts")]
    whole = backend.decode([*context, *ids], skip_special_tokens=True)
    shown = "".join([*pieces, detokenizer.flush()])
    assert backend.decode(context, skip_special_tokens=True) + shown == whole
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@given(ids=st.lists(st.integers(1, 256), max_size=30), data=st.data())
def test_that_holds_for_bytes_that_are_no_text_at_all(ids: list[int], data: st.DataObject) -> None:
    """What a random model says."""
    detokenizer = Detokenizer(byte_level(), byte_level().encode("x").ids)
    pieces = [detokenizer.feed(part) for part in data.draw(cuts(ids), "parts")]
    assert "".join([*pieces, detokenizer.flush()]) == byte_level().decode(ids)


@given(text=texts, guess=texts, data=st.data())
def test_a_look_ahead_adds_nothing(text: str, guess: str, data: st.DataObject) -> None:
    ids, ahead = byte_level().encode(text).ids, byte_level().encode(guess).ids
    looking, steady = Detokenizer(byte_level()), Detokenizer(byte_level())
    for part in data.draw(cuts(ids), "parts"):
        looking.peek(ahead[:5])
        assert looking.feed(part) == steady.feed(part)
    assert looking.flush() == steady.flush()


def test_a_look_ahead_shows_what_would_come() -> None:
    detokenizer = Detokenizer(bundled(), bundled().encode("def area(r):").ids)
    detokenizer.feed(bundled().encode("\n    ").ids)
    assert detokenizer.peek(bundled().encode("return 3").ids) == "return 3"


@st.composite
def cuts(draw: st.DrawFn, ids: Sequence[int]) -> list[Sequence[int]]:
    """The ids in runs of any length."""
    ends = sorted(draw(st.lists(st.integers(0, len(ids)), max_size=8)))
    return [ids[start:end] for start, end in zip([0, *ends], [*ends, len(ids)], strict=True)]


letters = st.text("ab", max_size=24)
stop_strings = st.text("ab", min_size=1, max_size=4)


@given(text=letters, stop=stop_strings, data=st.data())
def test_no_part_of_a_stop_string_is_shown(text: str, stop: str, data: st.DataObject) -> None:
    filter_, shown = StopStrings([stop]), ""
    for part in data.draw(cuts(list(map(ord, text))), "parts"):
        shown += filter_.feed("".join(map(chr, part)))
        assert text.split(stop)[0].startswith(shown)
        assert not shown or stop not in shown
    shown += filter_.feed("", final=True)
    assert shown == text.split(stop)[0]
    assert filter_.hit == (stop in text)


@given(text=letters, stops=st.lists(stop_strings, max_size=3))
@example(text="baa", stops=["a", "baa"])
@example(text="abab", stops=["b", "aba", "ab"])
def test_where_the_text_ends_does_not_depend_on_how_it_comes(text: str, stops: list[str]) -> None:
    by_letter, at_once = StopStrings(stops), StopStrings(stops)
    shown = "".join(map(by_letter.feed, text)) + by_letter.feed("", final=True)
    assert at_once.feed(text) + at_once.feed("", final=True) == shown
    assert at_once.hit == by_letter.hit == any(stop in text for stop in stops)
    assert not any(stop in shown for stop in stops)


@given(text=letters)
def test_without_stop_strings_nothing_is_held_back(text: str) -> None:
    assert StopStrings([]).feed(text) == StopStrings([""]).feed(text) == text


def test_nothing_is_shown_after_a_stop() -> None:
    stops = StopStrings(["\n\n"])
    assert [stops.feed(text) for text in ("a\n", "\nb", "c", "\n\n")] == ["a", "", "", ""]


def test_the_bundled_pair_shares_its_vocabulary() -> None:
    check_same_vocabulary(bundled_target(), bundled_draft())


@settings(max_examples=30)
@given(data=st.data())
def test_the_first_difference_is_named(data: st.DataObject) -> None:
    tokens = [f"t{9 - i}" for i in range(8)]  # by name they stand in another order than by id
    first = data.draw(st.integers(0, 7), "first")
    changed = data.draw(st.sets(st.integers(first, 7)), "changed") | {first}
    target = {token: i for i, token in enumerate(tokens)}
    draft = {f"u{i}" if i in changed else token: i for i, token in enumerate(tokens)}
    with pytest.raises(TokenizerError) as caught:
        check_same_tokens(target, draft)
    assert f"at id {first}, 't{9 - first}' in the target and 'u{first}' in the draft" in str(caught.value)
    assert f"({len(changed)} ids differ)" in str(caught.value)


def test_a_token_that_only_one_has_is_a_difference(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path / "target")
    larger = byte_tokenizer()
    larger.add_tokens([AddedToken("<|more|>")])
    larger.save_pretrained(tmp_path / "draft")
    with pytest.raises(TokenizerError, match=r"at id 257, no token in the target and '<\|more\|>' in the draft"):
        check_same_vocabulary(tmp_path / "target", tmp_path / "draft")


def test_the_files_own_cutting_and_filling_is_for_training(tmp_path: Path) -> None:
    """As transformers does: a prompt is neither cut nor filled up, whatever number stands in the file."""
    byte_tokenizer().save_pretrained(tmp_path)
    document = json.loads((tmp_path / "tokenizer.json").read_text())
    document["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    document["padding"] = {
        **{"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None},
        **{"pad_id": 0, "pad_type_id": 0, "pad_token": "<|end|>"},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    expected = AutoTokenizer.from_pretrained(tmp_path)("some text")["input_ids"]
    assert len(expected) == 9
    for tokenizer in (read_tokenizer(tmp_path), load_tokenizer(tmp_path).tokenizer):
        assert tokenizer.encode("some text").ids == expected
