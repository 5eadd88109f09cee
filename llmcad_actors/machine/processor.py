"""What the processor can do, read without torch."""

import os
from pathlib import Path

BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})  # x86: two; ARM: one


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def has_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether there are instructions that multiply bfloat16 numbers; where it cannot be told, yes."""
    return all(BFLOAT16_FLAGS & each for each in _flags(cpuinfo))


def _flags(cpuinfo: Path) -> list[frozenset[str]]:
    """Of each processor; none where the system does not tell."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return []
    return [
        frozenset(line.partition(":")[2].split()) for line in lines if line.lower().startswith(("flags", "features"))
    ]
