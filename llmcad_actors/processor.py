"""What the processor can do, read without torch."""

import os
from pathlib import Path

BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})  # x86: two; ARM: one


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def has_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether there are instructions that multiply bfloat16 numbers; where it cannot be told, yes."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return True
    flags = [line.partition(":")[2].split() for line in lines if line.lower().startswith(("flags", "features"))]
    return not flags or all(BFLOAT16_FLAGS & set(each) for each in flags)
