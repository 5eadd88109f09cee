"""One cap of `benchmarks.memory`, in a process of its own: it can be put in a cgroup, and it is the driver counted.

python -m benchmarks.memory_run TARGET DRAFT CAP TOKENS CONTEXT FALLBACK OUT        writes one JSON object to OUT
"""

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any, Self

import psutil

from benchmarks.workload import read_prompts
from llmcad_actors.config import EngineConfig
from llmcad_actors.engine import Engine
from llmcad_actors.errors import MemoryCapError
from llmcad_actors.machine.memory import by_group
from llmcad_actors.plan.prepare import prepare
from llmcad_actors.results import Result

NO_DRAFT = "none"
INTERVAL_S = 0.5


class GroupSampler:
    """What each part of llmcad uses, at the moment when all of them use most, and each one's own peak."""

    def __init__(self, interval_s: float = INTERVAL_S) -> None:
        self._root = psutil.Process(os.getpid())
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.at_peak: dict[str, int] = {}
        self.peaks: dict[str, int] = {}

    @property
    def peak_bytes(self) -> int:
        return sum(self.at_peak.values())

    def sample(self) -> None:
        now = by_group(self._root)
        self.peaks = {group: max(size, self.peaks.get(group, 0)) for group, size in now.items()}
        if sum(now.values()) > self.peak_bytes:
            self.at_peak = now

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(10)
        self.sample()

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            self.sample()


def run(config: EngineConfig, tokens: int) -> dict[str, Any]:
    """Figures of one request after a pass that touches what has to be touched, or the refusal."""
    try:
        job = prepare(config)
    except MemoryCapError as error:
        return {"refused": str(error).splitlines()[0]}
    prompt = read_prompts(1)[0]
    with GroupSampler() as sampler, Engine.start(job, count_caller=True) as engine:
        engine.generate(prompt, max_new_tokens=1)
        result = engine.generate(prompt, max_new_tokens=tokens, speculate=job.draft is not None)
        sampler.sample()  # before the actors end
    rows = dict(job.memory.rows())
    planned = rows.pop("runtime")
    return {
        **figures(result),
        **memory_figures(sampler, planned, sum(rows.values())),
        "store_bytes": job.memory.store_bytes,
        "planned_bytes": job.memory.total_bytes,
        "tokenizer_bytes": job.memory.tokenizer_bytes,
    }


def figures(result: Result) -> dict[str, Any]:
    stats = result.stats
    return {
        "seconds_per_token": stats.seconds / stats.new_tokens,
        "seconds_per_pass": stats.seconds / stats.target_passes,
        "tokens_per_pass": stats.tokens_per_pass,
        "bytes_read": stats.bytes_read,
        "pinned_bytes": stats.pinned_bytes,
        "window_bytes": stats.window_bytes,
        "spilled_bytes": stats.spilled_bytes,
        "cap_exceeded_bytes": stats.cap_exceeded_bytes,
        "memory_cap_bytes": stats.memory_cap_bytes,
        "token_ids": list(result.token_ids),
    }


def memory_figures(sampler: GroupSampler, planned_overhead: int, parts: int) -> dict[str, Any]:
    """`parts`: bytes of weights, caches, activations, window and buffers; what the peak has beyond is overhead."""
    return {
        "peak_bytes": sampler.peak_bytes,
        "peak_by_group": sampler.at_peak,
        "own_peaks": sampler.peaks,
        "overhead_bytes": sampler.peak_bytes - parts,
        "planned_overhead_bytes": planned_overhead,
    }


def main() -> None:
    target, draft, cap, tokens, context, fallback, out = sys.argv[1:]
    small = None if draft == NO_DRAFT else draft
    config = EngineConfig(target=target, draft=small, memory=cap, max_context=int(context) or None, fallback=fallback)
    Path(out).write_text(json.dumps(run(config, int(tokens))))


if __name__ == "__main__":
    main()
