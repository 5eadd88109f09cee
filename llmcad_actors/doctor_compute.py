"""How fast the cores multiply and copy: a process of its own, because the caller is to stay without torch.

python -m llmcad_actors.doctor_compute [--quick]      prints `ComputeFigures` as one JSON object
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from typing import Any

from llmcad_actors.doctor_figures import ComputeFigures

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
QUICK_ROWS = (1, 16, 128)
DTYPES = ("bfloat16", "float32")
MATRIX = (4096, 4096)
NUM_MATRICES = 3  # used in turn: as in a pass, the weights come from memory and not from a cache
COPY_BYTES = 256 << 20
LEAST_RUNS = 3
SECONDS = 0.2  # of each figure, at least


def measure_compute(
    rows: tuple[int, ...] = ROWS, matrix: tuple[int, int] = MATRIX, seconds: float = SECONDS
) -> ComputeFigures:
    """Median rates with all usable cores."""
    import torch

    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    flops: dict[str, dict[int, float]] = {}
    with torch.inference_mode():
        for dtype in DTYPES:
            kind = getattr(torch, dtype)
            weights = [torch.randn(matrix, dtype=torch.float32).to(kind) for _ in range(NUM_MATRICES)]
            flops[dtype] = {}
            for n in rows:
                states = torch.randn(n, matrix[1]).to(kind)
                with cores_for(kind):
                    took = median_seconds(partial(_multiply, linear_layer(kind), states, weights), seconds)
                flops[dtype][n] = 2 * n * matrix[0] * matrix[1] / took
            del weights
        source, target = torch.ones(2, COPY_BYTES, dtype=torch.uint8)
        copying = median_seconds(lambda run: target.copy_(source), seconds)
    return ComputeFigures(threads, matrix, flops, COPY_BYTES / copying)


def linear_layer(kind: Any) -> Callable[[Any, Any], Any]:
    """How the verifier multiplies rows and weights of this torch type."""
    from llmcad_actors.models import linear

    multiply = linear.chosen(kind, kind)
    return lambda rows, weight: multiply(rows, weight, None)


def cores_for(kind: Any) -> AbstractContextManager[None]:
    """What the verifier does with the threads around such products."""
    from llmcad_actors.models import linear

    return linear.cores() if linear.chosen(kind, kind) is linear.widened else nullcontext()


def _multiply(how: Callable[[Any, Any], Any], states: Any, weights: Sequence[Any], run: int) -> Any:
    return how(states, weights[run % len(weights)])


def median_seconds(work: Callable[[int], object], seconds: float) -> float:
    """Of several runs, after one that warms up. `work` gets the number of the run."""
    work(0)
    times: list[float] = []
    while len(times) < LEAST_RUNS or sum(times) < seconds:
        began = time.perf_counter()
        work(len(times) + 1)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


if __name__ == "__main__":
    print(json.dumps(asdict(measure_compute(QUICK_ROWS if "--quick" in sys.argv[1:] else ROWS))))
