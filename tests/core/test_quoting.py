"""What others wrote is shown on one line of 200 characters at most, whatever it is."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmcad_actors.core.quoting import MOST_CHARACTERS, quoted, shown

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def _selves() -> list[Any]:
    """A list that holds itself, and one of ten lists of ten lists of ..."""
    own: list[Any] = []
    own.append(own)
    wide: list[Any] = ["x"]
    for _ in range(40):
        wide = [wide] * 10
    return [own, wide]


HUGE = (
    10**5000,
    -(10**5000),
    "a" * 10**6,
    "\n" * 500,
    b"\0" * 10**6,
    [10**5000] * 10**5,
    {"k" * 9999: "\ud800"},
    *_selves(),
)


@given(values)
def test_a_short_value_is_shown_as_python_writes_it(value: Any) -> None:
    assert len(quoted(value)) <= MOST_CHARACTERS
    if isinstance(value, int | float) or (isinstance(value, str) and len(repr(value)) < 100):
        assert quoted(value) == repr(value)


@pytest.mark.parametrize("number", range(len(HUGE)))
def test_a_huge_one_is_cut(number: int) -> None:
    for text in (quoted(HUGE[number]), shown(quoted(HUGE[number]))):
        assert 0 < len(text) <= MOST_CHARACTERS
        assert text.isprintable()
    assert quoted(HUGE[0]) == "a number of 16,610 bits"


@given(st.text(max_size=1000))
def test_text_is_printable_and_keeps_its_ends(text: str) -> None:
    assert shown(text).isprintable()
    assert len(shown(text)) <= MOST_CHARACTERS
    if text.isprintable():
        assert shown(text) == text if len(text) <= MOST_CHARACTERS else shown(text).startswith(text[:100])
        assert shown(text).endswith(text[-50:])


def test_what_no_terminal_can_print_is_escaped() -> None:
    assert shown("a\nb\ud800\x1b[31m") == "a\\nb\\ud800\\x1b[31m"
