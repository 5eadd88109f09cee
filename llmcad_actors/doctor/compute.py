"""How fast the cores multiply, run layers and copy: a process of its own, because the caller is to stay without torch.

python -m llmcad_actors.doctor.compute [--quick]      prints `ComputeFigures` as one JSON object
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from typing import Any

from llmcad_actors.machine.figures import ComputeFigures

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
QUICK_ROWS = (1, 16, 128)
DTYPES = ("bfloat16", "float32")
MATRIX = (4096, 4096)
NUM_MATRICES = 3  # used in turn: as in a pass, the weights come from memory and not from a cache
LAYER = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 8}
NUM_LAYERS = 2  # likewise
COPY_BYTES = 256 << 20
LEAST_RUNS = 3
SECONDS = 0.2  # of each figure, at least


def measure_compute(
    rows: tuple[int, ...] = ROWS,
    matrix: tuple[int, int] = MATRIX,
    layer: Mapping[str, int] = LAYER,
    seconds: float = SECONDS,
) -> ComputeFigures:
    """Median rates with all usable cores."""
    import torch

    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    flops: dict[str, dict[int, float]] = {}
    layer_flops: dict[str, dict[int, float]] = {}
    with torch.inference_mode():
        for dtype in DTYPES:
            kind = getattr(torch, dtype)
            weights = [torch.randn(matrix).bfloat16() for _ in range(NUM_MATRICES)]
            flops[dtype] = {}
            for n in rows:
                states = torch.randn(n, matrix[1]).to(kind)
                with cores_for(kind):
                    took = median_seconds(partial(_multiply, linear_layer(kind), states, weights), seconds)
                flops[dtype][n] = 2 * n * matrix[0] * matrix[1] / took
            del weights
            layer_flops[dtype] = measure_layers(kind, rows, layer, seconds)
        source, target = torch.ones(2, COPY_BYTES, dtype=torch.uint8)
        copying = median_seconds(lambda run: target.copy_(source), seconds)
    return ComputeFigures(threads, matrix, flops, COPY_BYTES / copying, layer_flops)


def measure_layers(kind: Any, rows: Sequence[int], layer: Mapping[str, int], seconds: float) -> dict[int, float]:
    """FLOP per second of a Llama layer's products, by rows, in the time that all of the layer takes.

    What is between the products is small, but finds the caches full of weights: it must be measured among them.
    """
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    from llmcad_actors.kernels import attention, linear
    from llmcad_actors.kernels import library as kernels

    own = kind == torch.float32 and kernels.available()
    config = LlamaConfig(**layer, num_hidden_layers=1, attn_implementation=attention.NAME if own else "sdpa")
    layers = torch.nn.ModuleList(LlamaDecoderLayer(config, 0) for _ in range(NUM_LAYERS)).to(kind)
    for matrix in (each for each in layers.parameters() if each.ndim > 1):
        matrix.data = matrix.data.bfloat16()  # as most checkpoints are stored
    linear.install(layers, linear.chosen(torch.bfloat16, kind))
    rotary, numbers = LlamaRotaryEmbedding(config), sum(weight.numel() for weight in layers[0].parameters())
    flops = {}
    for n in rows:
        states = torch.randn(1, n, config.hidden_size).to(kind)
        mask, turned = torch.zeros(1, 1, n, n, dtype=kind), rotary(states, torch.arange(n)[None])
        run = partial(_run_layer, layers, states, attention_mask=mask, position_embeddings=turned)
        with cores_for(kind):
            took = median_seconds(run, seconds)
        flops[n] = 2 * n * numbers / took
    return flops


def linear_layer(kind: Any) -> Callable[[Any, Any], Any]:
    """How the verifier multiplies rows of this torch type with weights stored in bfloat16."""
    import torch

    from llmcad_actors.kernels import linear

    multiply = linear.chosen(torch.bfloat16, kind)
    return lambda rows, weight: multiply(rows, weight, None)


def cores_for(kind: Any) -> AbstractContextManager[None]:
    """What the verifier does with the threads around such products."""
    import torch

    from llmcad_actors.kernels import linear

    is_widened = linear.chosen(torch.bfloat16, kind) is linear.widened
    return linear.cores(kind) if is_widened else nullcontext()


def _multiply(how: Callable[[Any, Any], Any], states: Any, weights: Sequence[Any], run: int) -> Any:
    return how(states, weights[run % len(weights)])


def _run_layer(layers: Any, states: Any, run: int, **options: Any) -> Any:
    return layers[run % len(layers)](states, **options)


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
