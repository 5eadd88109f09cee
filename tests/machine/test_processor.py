from pathlib import Path

import pytest

from llmcad_actors.machine.processor import cores, has_bfloat16, has_vectors


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


@pytest.mark.parametrize(
    ("flags", "machine", "expected"),
    [
        ("flags : fma avx2 f16c sse", "x86_64", True),
        ("flags : fma avx f16c", "x86_64", False),
        ("flags : fma avx2 f16c\nflags : fma avx", "x86_64", False),
        ("model name : unknown", "x86_64", False),
        ("Features : fp asimd", "aarch64", True),
        ("Features : half thumb neon", "armv7l", False),
    ],
)
def test_the_kernels_vectors_are_told_too(tmp_path: Path, flags: str, machine: str, expected: bool) -> None:
    (tmp_path / "cpuinfo").write_text(flags)
    assert has_vectors(tmp_path / "cpuinfo", machine) is expected


def test_there_is_a_core_to_run_on() -> None:
    assert cores() >= 1
