"""Does Ray start and stop here, and where does it listen? `python -m llmcad_actors.actors.ray_check` tells as JSON."""

import json
import time
from contextlib import suppress
from typing import Any

import psutil
import ray

from llmcad_actors.actors.lean_ray import LocalRay
from llmcad_actors.core.budget import LEAST_STORE_BYTES


def check() -> dict[str, Any]:
    """Start Ray as an engine does, put and get one object, stop: seconds, and the addresses of its TCP ports."""
    began = time.perf_counter()
    local = LocalRay(LEAST_STORE_BYTES)
    try:
        ray.get(ray.put(b"x" * 1000), timeout=30)
        started = time.perf_counter()
        listens_on = listening()
    finally:
        local.close()
    return {"start_s": started - began, "stop_s": time.perf_counter() - started, "listens_on": listens_on}


def listening() -> list[str]:
    """Address of each TCP port that this process and those below it listen on."""
    found = []
    for process in (me := psutil.Process(), *me.children(recursive=True)):
        with suppress(psutil.Error):
            found += [c.laddr.ip for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    return [address.removeprefix("::ffff:") for address in found]


if __name__ == "__main__":
    print(json.dumps(check()))
