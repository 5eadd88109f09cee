"""Waiting for actors: every wait has a deadline, every failure becomes one of our exceptions."""

import asyncio
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from llmcad_actors.errors import ActorFailure, DeadlineError, LlmcadError


def fetch(ref: Any, timeout_s: float, what: str) -> Any:
    """The result of an actor call; raises `DeadlineError`, `ActorFailure`, or the actor's own `LlmcadError`."""
    try:
        return ray.get(ref, timeout=timeout_s)
    except GetTimeoutError:
        raise DeadlineError(f"{what} did not come within {timeout_s:.0f} s") from None
    except RayError as error:
        raise as_ours(error, what) from None


async def fetch_async(ref: Any, timeout_s: float, what: str) -> Any:
    """`fetch` for the event loop."""
    try:
        return await asyncio.wait_for(asyncio.wrap_future(ref.future()), timeout_s)
    except TimeoutError:
        raise DeadlineError(f"{what} did not come within {timeout_s:.0f} s") from None
    except RayError as error:
        raise as_ours(error, what) from None


def as_ours(error: RayError, what: str) -> LlmcadError:
    if isinstance(error, RayTaskError):
        if isinstance(error.cause, LlmcadError):
            return error.cause
        return ActorFailure(f"{what} failed: {error.cause!r}\n{error}")
    if isinstance(error, RayActorError):
        return ActorFailure(f"{what} failed: the actor died ({str(error).strip().splitlines()[-1]})")
    return ActorFailure(f"{what} failed: {error}")
