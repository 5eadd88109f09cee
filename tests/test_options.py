"""What a caller may give: settings and options are documented one by one, mean one thing, and are checked."""

import dataclasses
import inspect
import pydoc
import typing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmcad_actors import Engine, EngineConfig
from llmcad_actors.config import Settings, setting_names
from llmcad_actors.core.choosing import GREEDY, Choosing
from llmcad_actors.core.quoting import quoted
from llmcad_actors.errors import ConfigError, LlmcadError, MemoryCapError
from llmcad_actors.plan.prepare import prepare
from llmcad_actors.plan.shorthand import spelled_out
from llmcad_actors.requests.options import Options, RequestOptions, trace_path
from llmcad_actors.tools.bundled import bundled_draft, bundled_target

OPENING = ("target", "draft", "memory")


class Awkward:
    """Nothing that anyone would expect."""

    def __repr__(self) -> str:
        raise RuntimeError

    def __eq__(self, other: object) -> bool:
        raise RuntimeError

    __hash__ = object.__hash__


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([10**5000, -(10**400), 2**63, 0, 1]),
    st.floats(),
    st.text(max_size=20),
    st.text(alphabet=st.characters(categories=["Cs"]), min_size=1, max_size=2),
    st.sampled_from(["", "none", "demo", "a\0b", "best-first", "power", "x" * 5000]),
    st.binary(max_size=5),
    st.lists(st.one_of(st.integers(), st.text(max_size=3), st.none()), max_size=4),
    st.tuples(st.integers(), st.floats()),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
    st.builds(Awkward),
    st.sampled_from([np.float64("nan"), np.int64(3), np.bool_(True), np.arange(3), np.zeros((2, 2)), object, len]),
)
"""Values of every kind."""


@given(st.dictionaries(st.sampled_from([*setting_names(), "memry"]), JUNK), st.booleans())
def test_whatever_is_set_is_a_setting_or_an_error_of_ours(junk: dict[str, Any], has_target: bool) -> None:
    settings = {"target": "somewhere"} | junk if has_target or "target" not in junk else junk
    try:
        if unknown := settings.keys() - set(setting_names()):
            with pytest.raises(ConfigError, match=f"unknown setting '{unknown.pop()}'; known: alpha, .*widths"):
                Engine.launch("somewhere", **{name: junk[name] for name in junk if name not in OPENING})
            return
        config = EngineConfig(**settings)
    except LlmcadError as error:
        assert str(error).replace(":", " ").split()[0] in settings
        assert len(str(error)) < 500
    else:
        for name, hint in typing.get_type_hints(EngineConfig).items():
            value = getattr(config, name)
            assert type(value) in {typing.get_origin(kind) or kind for kind in (*typing.get_args(hint), hint)}, name


@given(JUNK, st.dictionaries(st.sampled_from(list(Options.__annotations__)), JUNK))
def test_whatever_is_asked_for_is_a_request_or_an_error_of_ours(prompt: Any, junk: dict[str, Any]) -> None:
    try:
        options = RequestOptions(prompt, junk)
    except LlmcadError as error:
        assert str(error).replace(":", " ").split()[0] in {"prompt", *junk}
        assert len(str(error)) < 500
    else:
        assert type(options.prompt) is str
        assert type(options.max_new_tokens) is int
        assert all(type(stop) is str and stop for stop in options.stop)
        assert {type(options.chat), type(options.speculate), type(options.provisional)} == {bool}
        for name, hint in typing.get_type_hints(Choosing).items():
            kinds = {typing.get_origin(kind) or kind for kind in (*typing.get_args(hint), hint)}
            assert type(getattr(options.choosing, name)) in kinds, name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": b"x"}, "prompt: b'x' must be text"),
        ({"prompt": "caf\udce9"}, "prompt is not UTF-8: byte 0xe9 at offset 3"),
        ({"max_new_tokens": 2.5}, "max_new_tokens: 2.5 must be a whole number of at least 1"),
        ({"max_new_tokens": "3"}, "max_new_tokens: '3' must be a whole number"),
        ({"max_new_tokens": True}, "max_new_tokens: True must be a whole number"),
        ({"max_new_tokens": 0}, "max_new_tokens: 0 must be a whole number of at least 1"),
        ({"stop": 3}, "stop: 3 must be a text, or a list of texts"),
        ({"stop": None}, "stop: None must be a text, or a list of texts"),
        ({"stop": ["a", 3]}, "stop: 3 must be text"),
        ({"stop": ""}, "stop: an empty text cannot be waited for"),
        ({"chat": "yes"}, "chat: 'yes' must be true or false"),
        ({"speculate": None}, "speculate: None must be true or false"),
        ({"queue_timeout": "soon"}, "queue_timeout: 'soon' must be a number"),
        ({"queue_timeout": -1}, "queue_timeout: -1 must lie between 0 and"),
        ({"temperature": -0.5}, "temperature: -0.5 must lie between 0 and 100"),
        ({"temperature": float("nan")}, "temperature: nan must lie between 0 and 100"),
        ({"temperature": True}, "temperature: True must be a number"),
        ({"top_k": 2.5}, "top_k: 2.5 must be a whole number"),
        ({"top_p": 1.5}, "top_p: 1.5 must lie between 0 and 1"),
        ({"min_p": "0"}, "min_p: '0' must be a number"),
        ({"repetition_penalty": 0}, "repetition_penalty: 0 must lie between 0.001 and 1000"),
        ({"presence_penalty": 10**400}, "presence_penalty: a number of .* must lie between -100 and 100"),
        ({"frequency_penalty": "much"}, "frequency_penalty: 'much' must be a number"),
        ({"logit_bias": [3]}, r"logit_bias: \[3\] must be a mapping from token ids to numbers"),
        ({"logit_bias": {"a": 1}}, "logit_bias: the token id: 'a' must be a whole number"),
        ({"logit_bias": {3: "b"}}, "logit_bias of token 3: 'b' must be a number"),
        ({"seed": -1}, "seed: -1 must be a whole number of at least 0"),
        ({"seed": 2**64}, "seed: .* is too large"),
        ({"logprobs": 101}, "logprobs: 101 is too large; 100 is the most"),
        ({"temprature": 1.0}, "unknown option 'temprature'; known: .*temperature"),
    ],
    ids=str,
)
def test_an_option_of_a_request_that_cannot_be_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RequestOptions(options.pop("prompt", "x"), options)


def test_a_trace_is_a_path() -> None:
    with pytest.raises(ConfigError, match="trace: 3 must be a path"):
        trace_path(3)  # type: ignore[arg-type]


def test_the_default_is_greedy_and_a_sampled_request_has_a_seed_of_its_own() -> None:
    assert RequestOptions("x", {}).choosing == GREEDY
    first, second = (RequestOptions("x", {"temperature": 0.7}).choosing.seed for _ in range(2))
    assert first != second
    assert RequestOptions("x", {"temperature": 0.7, "seed": 3}).choosing == Choosing(temperature=0.7, seed=3)


def test_what_the_model_asks_for_is_followed_when_it_is_asked_for_and_what_is_given_wins() -> None:
    asked = {"temperature": 0.6, "top_k": 50, "top_p": 0.9, "min_p": 0.0}
    assert RequestOptions("x", {"seed": 1}, asked).choosing == Choosing(seed=1)
    followed = RequestOptions("x", {"sample": True, "seed": 1}, asked).choosing
    assert followed == Choosing(temperature=0.6, top_k=50, top_p=0.9, seed=1)
    given = RequestOptions("x", {"sample": True, "top_k": 7, "seed": 1}, asked).choosing
    assert given == Choosing(temperature=0.6, top_k=7, top_p=0.9, seed=1)
    assert RequestOptions("x", {"sample": True, "seed": 1}, {}).choosing == Choosing(temperature=1.0, seed=1)


def test_numbers_of_numpy_and_one_stop_string_are_taken_as_they_are_meant() -> None:
    options = RequestOptions("x", {"max_new_tokens": np.int32(3), "stop": "girl", "chat": np.bool_(False)})
    assert (options.max_new_tokens, options.stop, options.chat) == (3, ("girl",), False)
    config = EngineConfig(target="x", max_nodes=np.int64(7), widths=[1, 2], alpha=np.float32(0.5))  # type: ignore[arg-type]
    assert (config.max_nodes, config.widths, config.alpha) == (7, (1, 2), 0.5)


@pytest.mark.parametrize(
    "value", [0, 1, 10**5000, -(10**5000), float("nan"), float("inf"), True, "0.5", None], ids=quoted
)
def test_a_share_lies_between_0_and_1(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"alpha: .* must (lie between 0 and 1|be a number)"):
        EngineConfig(target="x", alpha=value)


def test_a_message_quotes_no_more_than_200_characters_of_a_value() -> None:
    for value in ("x" * 5000, 10**5000, list(range(5000)), Awkward(), [Awkward()]):
        assert len(quoted(value)) < 210


def test_python_takes_memory_and_models_as_the_command_line_does(tmp_path: Path) -> None:
    target, draft = bundled_target(), bundled_draft()
    as_text = prepare(EngineConfig(target=str(target), draft=str(draft), memory="1000000000"))
    in_bytes = prepare(EngineConfig(target=target, draft=draft, memory=1_000_000_000))  # type: ignore[arg-type]
    assert in_bytes.config == as_text.config
    assert in_bytes.memory.cap_bytes == 1_000_000_000
    for none in ("none", "", None):
        assert prepare(EngineConfig(target=str(target), draft=none, memory="1GB")).draft is None
    for memory in (1.5, True, b"1GB", ["1GB"]):
        with pytest.raises(ConfigError, match=r"memory: .* must be text, such as '1.5GB', or a whole number of bytes"):
            EngineConfig(target=str(target), memory=memory)  # type: ignore[arg-type]


def test_demo_stands_for_the_bundled_pair_under_the_demos_cap() -> None:
    demo = spelled_out(EngineConfig(target="demo"), lambda: Path("made"))
    assert (demo.target, demo.draft, demo.memory) == ("made", str(bundled_draft()), "1.5GB")
    own = spelled_out(EngineConfig(target="demo", draft="none", memory=10**9), lambda: Path("made"))
    assert (own.target, own.draft, own.memory) == ("made", None, "1000000000")
    other = spelled_out(EngineConfig(target="./demo"), lambda: pytest.fail("not the demo"))
    assert (other.target, other.draft, other.memory) == ("./demo", None, "75%")


def test_launching_the_demo_takes_the_word_as_the_command_line_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MemoryCapError, match="too small"):
        Engine.launch(bundled_target(), draft="none", memory=1_000_000)
    monkeypatch.setattr("llmcad_actors.tools.bundled.PAIR", tmp_path)
    monkeypatch.setenv("LLMCAD_CACHE", str(tmp_path))
    with pytest.raises(LlmcadError, match=str(tmp_path / "target")):  # what would be enlarged, which is absent here
        Engine.launch("demo", memory=1_000_000)


def test_what_is_said_and_counted_at_the_start_is_checked_before_it() -> None:
    job = prepare(EngineConfig(target=str(bundled_target()), memory="4GB"))
    with pytest.raises(ConfigError, match="say: 'loud' must be a function"):
        Engine.start(job, say="loud")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="count_caller: 'yes' must be true or false"):
        Engine.start(job, count_caller="yes")  # type: ignore[arg-type]
    for target in (None, 3, b"model"):
        with pytest.raises(ConfigError, match=r"target: .* must be a path or a name"):
            Engine.launch(target)  # type: ignore[arg-type]


def test_every_setting_and_option_is_typed_and_documented() -> None:
    hints = typing.get_type_hints(EngineConfig)
    settings = typing.get_type_hints(Settings)
    assert [*OPENING, *settings] == list(hints) == [field.name for field in dataclasses.fields(EngineConfig)]
    assert {n: hints[n] for n in settings if n != "widths"} == {n: settings[n] for n in settings if n != "widths"}
    engine, config = (pydoc.plain(pydoc.render_doc(kind)) for kind in (Engine, EngineConfig))
    for name in hints:
        assert f"  {name}: " in config
        assert f"  {name}: " in engine
    for method in (Engine.generate, Engine.stream, Engine.launch):
        for parameter in inspect.signature(method).parameters.values():
            assert parameter.annotation is not Any, parameter
            assert "Any" not in str(parameter.annotation), parameter
            if parameter.kind is parameter.KEYWORD_ONLY:
                assert f"{parameter.name}: " in pydoc.render_doc(Engine.generate) + pydoc.render_doc(Engine.stream) or (
                    f"`{parameter.name}`" in pydoc.render_doc(Engine.launch)
                )
    submitting = pydoc.render_doc(Engine.submit)
    assert all(f"{name}: " in submitting or f"{name}, " in submitting for name in Options.__annotations__)
