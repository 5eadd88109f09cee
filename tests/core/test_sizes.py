import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmcad_actors.core.sizes import format_size, parse_file_size, parse_rate, parse_size
from llmcad_actors.errors import ConfigError

RAM = 16 * 10**9


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1.5GB", 1_500_000_000),
        ("2.01GB", 2_010_000_000),
        ("512MiB", 536_870_912),
        ("4G", 4_000_000_000),
        ("1500M", 1_500_000_000),
        ("800kb", 800_000),
        ("1 TiB", 2**40),
        (" 2gib ", 2**31),
        ("1500000000", 1_500_000_000),
        ("1234B", 1234),
        (".5GB", 500_000_000),
        ("75%", 12_000_000_000),
        ("12.5 %", 2_000_000_000),
        ("100%", RAM),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_size(text, RAM) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "lots", "-1GB", "1,5GB", "0", "0%", "101%", "1.5.5G", "4 G B", "4GBs", "1e9", "nan"]
)
def test_anything_else_is_refused_with_examples(text: str) -> None:
    with pytest.raises(ConfigError, match=r"4GB.*512MiB.*75%.*16\.00 GB") as refusal:
        parse_size(text, RAM)
    assert repr(text) in str(refusal.value)


@pytest.mark.parametrize("text", ["1.5", "1500", "4", "999999", ".5", " 2 ", "1000000.5"])
def test_a_number_without_a_unit_is_not_taken_for_bytes(text: str) -> None:
    number = text.strip()
    for parse in (lambda: parse_size(text, RAM), lambda: parse_rate(text), lambda: parse_file_size(text, "a size")):
        with pytest.raises(ConfigError, match=rf"the unit is missing; write {number}GB, {number}MB or.* {number}B"):
            parse()


@pytest.mark.parametrize(
    "text", ["9" * 5000, "9" * 5000 + "GB", "1." + "9" * 5000 + "GB", "x" * 5000, "9" * 5000 + "%"]
)
def test_a_size_of_any_length_is_refused_in_a_short_message(text: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        parse_size(text, RAM)
    assert len(str(refusal.value)) < 250


def test_the_size_of_a_file_is_no_share_of_anything() -> None:
    assert parse_file_size("80MB", "the size of the demo") == 80_000_000
    for text in ("foo", "50%", "", "-1GB", "0GB"):
        with pytest.raises(ConfigError, match=r"cannot use '.*' as the size of the demo: write for example 2\.5GB"):
            parse_file_size(text, "the size of the demo")


def test_rates_are_sizes_per_second() -> None:
    assert parse_rate("400MB/s") == 4e8
    assert parse_rate("1.5GB") == 1.5e9
    with pytest.raises(ConfigError, match="400MB/s"):
        parse_rate("fast")
    with pytest.raises(ConfigError, match="400MB/s"):
        parse_rate("75%")


@given(st.integers(1, 10**13))
def test_a_formatted_size_reads_back_as_about_the_same(size: int) -> None:
    assert parse_size(format_size(size), RAM) == pytest.approx(size, rel=0.05)


def test_sizes_are_formatted_in_decimal_units() -> None:
    assert [format_size(n) for n in (12, 1500, 512_000_000, 1_500_000_000)] == ["12 B", "1.5 KB", "512.0 MB", "1.50 GB"]
