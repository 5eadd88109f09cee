from pathlib import Path

import pytest

from llmcad_actors.machine.processor import cores, has_bfloat16


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx2 fma\n", False),
        ("processor\t: 0\nflags\t\t: fpu avx2 avx512_bf16\n", True),
        ("processor\t: 0\nFeatures\t: fp asimd\n", False),  # a Raspberry Pi 4
        ("processor\t: 0\nFeatures\t: fp asimd bf16 i8mm\n", True),
        ("processor\t: 0\nFeatures\t: asimd bf16\n\nprocessor\t: 1\nFeatures\t: asimd\n", False),  # not on every core
        ("model name\t: unknown\n", True),
    ],
)
def test_bfloat16_is_told_from_the_flags(tmp_path: Path, cpuinfo: str, expected: bool) -> None:
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    assert has_bfloat16(tmp_path / "cpuinfo") is expected


def test_without_the_file_it_is_assumed(tmp_path: Path) -> None:
    assert has_bfloat16(tmp_path / "none")


def test_there_is_a_core_to_run_on() -> None:
    assert cores() >= 1
