"""Who owns the Ray of this process: the caller, one engine, or nobody yet.

A process has one Ray. An engine that finds none starts one with an object store of exactly its window: that of a second
engine would not fit, and would go unnoticed to a file on disk. So it keeps its Ray to itself until it is closed.
"""

import threading
from typing import Protocol

from llmcad_actors.actors.calls import Line
from llmcad_actors.errors import EngineBusyError, RuntimeFailure


class OwnRay(Protocol):
    """A Ray of this process: ours, or the caller's, in which case `close` leaves it alone."""

    is_ours: bool
    line: Line

    def close(self) -> None:
        """May be called again."""


_deciding = threading.Lock()
_owned: list[OwnRay] = []  # what an engine started: one at most


def start_ray(store_bytes: int, *, plain: bool = False) -> OwnRay:
    """A Ray for one engine: its own, or the caller's. Raises `EngineBusyError` where it is another engine's own.

    plain: started through Ray's public interface alone; nothing that knows its insides is imported.
    """
    with _deciding:
        if _owned:
            raise EngineBusyError(
                "another engine of this process is open, and the Ray that it started has room for one; close that "
                "engine first, or call ray.init() before launching several, or launch this one in another process"
            )
        ray_ = _plain(store_bytes) if plain else _lean(store_bytes)
        if ray_.is_ours:
            _owned.append(ray_)
        return ray_


def _lean(store_bytes: int) -> OwnRay:
    try:
        from llmcad_actors.actors.lean_ray import LocalRay
    except ImportError as error:  # another version of Ray may lack what it imports
        raise RuntimeFailure(f"this Ray is not the one that llmcad knows: {error}; try --plain-ray") from error
    return LocalRay(store_bytes)


def _plain(store_bytes: int) -> OwnRay:
    from llmcad_actors.actors.plain_ray import PlainRay

    return PlainRay(store_bytes)


def end_ray(ray_: OwnRay) -> None:
    """The engine needs it no more; the caller's own goes on."""
    try:
        ray_.close()
    finally:
        if ray_ in _owned:
            _owned.remove(ray_)
