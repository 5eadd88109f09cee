"""Does Ray start and stop here? `python -m llmcad_actors.actors.ray_check` prints the seconds of both as JSON."""

import json
import time

import ray

from llmcad_actors.actors.runtime import LocalRay
from llmcad_actors.core.budget import LEAST_STORE_BYTES


def check() -> dict[str, float]:
    """Start Ray as an engine does, put and get one object, stop."""
    began = time.perf_counter()
    local = LocalRay(LEAST_STORE_BYTES)
    try:
        ray.get(ray.put(b"x" * 1000), timeout=30)
        started = time.perf_counter()
    finally:
        local.close()
    return {"start_s": started - began, "stop_s": time.perf_counter() - started}


if __name__ == "__main__":
    print(json.dumps(check()))
