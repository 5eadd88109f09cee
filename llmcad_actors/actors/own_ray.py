"""Who owns the Ray of this process: the caller, one engine, or nobody yet.

A process has one Ray. An engine that finds none starts one with an object store of exactly its window: that of a second
engine would not fit, and would go unnoticed to a file on disk. So it keeps its Ray to itself until it is closed.
"""

import threading

from llmcad_actors.actors.lean_ray import LocalRay
from llmcad_actors.errors import EngineBusyError

_deciding = threading.Lock()
_owned: list[LocalRay] = []  # what an engine started: one at most


def start_ray(store_bytes: int) -> LocalRay:
    """A Ray for one engine: its own, or the caller's. Raises `EngineBusyError` where it is another engine's own."""
    with _deciding:
        if _owned:
            raise EngineBusyError(
                "another engine of this process is open, and the Ray that it started has room for one; close that "
                "engine first, or call ray.init() before launching several, or launch this one in another process"
            )
        ray_ = LocalRay(store_bytes)
        if ray_.is_ours:
            _owned.append(ray_)
        return ray_


def end_ray(ray_: LocalRay) -> None:
    """The engine needs it no more; the caller's own goes on."""
    try:
        ray_.close()
    finally:
        if ray_ in _owned:
            _owned.remove(ray_)
