"""The coordinator: one asyncio loop that runs requests over the draft and verifier actors."""

import asyncio
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from llmcad_actors.actors.calls import failure, fetch_async
from llmcad_actors.actors.traced import TracedDrafter, TracedVerifier
from llmcad_actors.core.costs import Costs
from llmcad_actors.core.fallback import Policy
from llmcad_actors.core.round import Grown, Submission, Verdict
from llmcad_actors.core.trace import Recorder
from llmcad_actors.core.tree import TokenTree
from llmcad_actors.errors import LlmcadError
from llmcad_actors.loop import Learnt, decode
from llmcad_actors.messages import DraftEnded, Event, Failed, Request, pack, unpack

CALL_TIMEOUT_S = 600.0
PASS_TIMEOUT_S = 4 * 3600.0  # a pass over slow storage takes long; a shard that does not come fails much sooner


class RemoteDrafter:
    """The `Drafter` port over the draft actor, which hears of a prompt with the first order for a tree."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self._prompt: tuple[int, ...] | None = None  # None: the actor knows it

    async def begin(self, prompt: tuple[int, ...]) -> None:
        self._prompt = prompt

    async def grow(self, verdicts: Sequence[Verdict], policy: Policy, costs: Costs) -> Submission:
        order, self._prompt = pack((self._prompt, tuple(verdicts), policy, costs)), None
        result: Submission = unpack(await fetch_async(self._actor.grow.remote(order), CALL_TIMEOUT_S, "drafting"))
        return result

    async def extend(self) -> Grown:
        result: Grown = unpack(await fetch_async(self._actor.extend.remote(), CALL_TIMEOUT_S, "drafting ahead"))
        return result


class RemoteVerifier:
    """The `Verifier` port over the verifier actor."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def begin(self, prompt: tuple[int, ...], stop_tokens: tuple[int, ...], max_new_tokens: int) -> int:
        call = self._actor.begin.remote(pack(prompt), pack(stop_tokens), max_new_tokens)
        held: int = await fetch_async(call, CALL_TIMEOUT_S, "the target's start")
        return held

    async def verify(self, tree: TokenTree) -> Verdict:
        call = self._actor.verify.remote(pack(tree))
        verdict: Verdict = unpack(await fetch_async(call, PASS_TIMEOUT_S, "a target pass"))
        return verdict


class MonotonicClock:
    def now(self) -> float:
        return time.monotonic()


class Outbox:
    """Events on their way to the caller. Nothing is lost when a wait for them ends."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._arrived = asyncio.Event()

    def put(self, event: Event) -> None:
        self._events.append(event)
        self._arrived.set()

    async def take(self, wait_s: float) -> list[Event]:
        """All events since the last call; waits up to `wait_s` for the first."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._arrived.wait(), wait_s)
        events, self._events = self._events, []
        self._arrived.clear()
        return events


class Coordinator:
    """Requests in, events out; the caller polls `events`."""

    def __init__(self, verifier: Any, draft: Any, policy: bytes, costs: bytes) -> None:
        self._recorder = recorder = Recorder("coordinator", time.monotonic)
        self._verifier = TracedVerifier(RemoteVerifier(verifier), recorder)
        self._drafter = TracedDrafter(RemoteDrafter(draft), recorder) if draft is not None else None
        self._learnt = Learnt(unpack(policy), unpack(costs))
        self._has_ended_draft = False
        self._outbox = Outbox()
        self._task: asyncio.Task[None] | None = None

    async def ready(self) -> None:
        """Returns when the actor is up."""

    async def start(self, request: bytes) -> None:
        """Begin a request; a request still running is cancelled first."""
        await self.cancel()
        self._outbox = Outbox()
        self._task = asyncio.create_task(self._run(unpack(request), self._outbox.put))

    async def events(self, wait_s: float) -> bytes:
        """Events since the last call; waits up to `wait_s` for the first."""
        return pack(await self._outbox.take(wait_s))

    async def cancel(self) -> None:
        """Stop the running request. A pass under way runs to its end, and nobody waits for it."""
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait([self._task], timeout=CALL_TIMEOUT_S)

    async def trace(self, goes_on: bool) -> bytes:
        """What was recorded since the last call; recording goes on, or stops."""
        return pack(self._recorder.drain(goes_on=goes_on))

    async def _run(self, request: Request, emit: Callable[[Event], None]) -> None:
        drafter = self._drafter if request.speculate and not self._has_ended_draft else None
        if self._has_ended_draft:
            emit(DraftEnded())  # again: the last request may have been cancelled before its caller heard of it

        def note(event: Event) -> None:
            self._has_ended_draft |= isinstance(event, DraftEnded)
            emit(event)

        try:
            learnt = await decode(request, drafter, self._verifier, self._learnt, MonotonicClock(), note)
        except LlmcadError as error:
            emit(Failed.of(error))
            return
        except Exception as error:  # a bug of ours: the caller must hear of it, or would wait for ever
            emit(Failed.of(failure(f"the coordinator broke: {error!r}", traceback.format_exc())))
            return
        if drafter is not None:
            self._learnt = learnt
