import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmcad_actors.core.sizes import format_size, parse_rate, parse_size
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
        ("1234", 1234),
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
