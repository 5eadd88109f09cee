"""The coordinator: one asyncio loop that runs all requests over the draft and verifier actors."""

import asyncio
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from llmcad_actors.actors.calls import failure, fetch_async
from llmcad_actors.actors.traced import TracedDrafter, TracedVerifier
from llmcad_actors.core.request import Request
from llmcad_actors.core.round import Check, Drafting, Grown, PassReport
from llmcad_actors.core.rounds import Arrival, Limits, News, Rounds
from llmcad_actors.core.trace import Recorder
from llmcad_actors.loop import serve
from llmcad_actors.messages import DraftEnded, DraftOrder, Event, Failed, Finished, pack, unpack

CALL_TIMEOUT_S = 600.0
GATHER_S = 0.01  # where nothing runs: who comes at the same time shares the first pass
PASS_TIMEOUT_S = 4 * 3600.0  # a pass over slow storage takes long; a shard that does not come fails much sooner


class RemoteDrafter:
    """The `Drafter` port over the draft actor."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def grow(self, order: DraftOrder) -> Drafting:
        call = self._actor.grow.remote(pack(order))
        result: Drafting = unpack(await fetch_async(call, CALL_TIMEOUT_S, "drafting"))
        return result

    async def extend(self) -> Grown:
        result: Grown = unpack(await fetch_async(self._actor.extend.remote(), CALL_TIMEOUT_S, "drafting ahead"))
        return result


class RemoteVerifier:
    """The `Verifier` port over the verifier actor."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def change(self, ended: Sequence[int], joined: Mapping[int, Request]) -> Mapping[int, int]:
        call = self._actor.change.remote(pack((tuple(ended), dict(joined))))
        held: Mapping[int, int] = unpack(await fetch_async(call, CALL_TIMEOUT_S, "the target's start"))
        return held

    async def verify(self, checks: Sequence[Check]) -> PassReport:
        call = self._actor.verify.remote(pack(tuple(checks)))
        report: PassReport = unpack(await fetch_async(call, PASS_TIMEOUT_S, "a target pass"))
        return report


class MonotonicClock:
    def now(self) -> float:
        return time.monotonic()


class Inbox:
    """Requests on their way to the loop."""

    def __init__(self) -> None:
        self._news = News()
        self._came = asyncio.Event()

    def add(self, arrival: Arrival) -> None:
        self._tell(replace(self._news, arrivals=(*self._news.arrivals, arrival)))

    def cancel(self, number: int) -> None:
        self._tell(replace(self._news, cancelled=self._news.cancelled | {number}))

    def _tell(self, news: News) -> None:
        self._news = news
        self._came.set()

    async def take(self, *, wait: bool) -> News:
        if wait:
            await self._came.wait()
            await asyncio.sleep(GATHER_S)
        news, self._news = self._news, News()
        self._came.clear()
        return news


class Outbox:
    """Events on their way to the caller. Nothing is lost when a wait for them ends."""

    def __init__(self) -> None:
        self._events: list[tuple[int, Event]] = []
        self._arrived = asyncio.Event()

    def put(self, number: int, event: Event) -> None:
        self._events.append((number, event))
        self._arrived.set()

    async def take(self, wait_s: float) -> list[tuple[int, Event]]:
        """All events since the last call; waits up to `wait_s` for the first."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._arrived.wait(), wait_s)
        events, self._events = self._events, []
        self._arrived.clear()
        return events


class Coordinator:
    """Requests in, events out; the caller polls `events`."""

    def __init__(self, verifier: Any, draft: Any, policy: bytes, costs: bytes, limits: bytes) -> None:
        self._recorder = recorder = Recorder("coordinator", time.monotonic)
        self._verifier = TracedVerifier(RemoteVerifier(verifier), recorder)
        self._drafter = TracedDrafter(RemoteDrafter(draft), recorder) if draft is not None else None
        max_requests, rows = unpack(limits)
        self._first = Rounds(unpack(policy), unpack(costs), Limits(max_requests, rows))
        self._inbox, self._outbox = Inbox(), Outbox()
        self._open = set[int]()
        self._serving: asyncio.Task[None] | None = None

    async def ready(self) -> None:
        """Returns when the actor is up."""

    async def submit(self, number: int, request: bytes) -> None:
        """A request, by a number that was never given before. It runs as soon as it has room."""
        self._open.add(number)
        self._inbox.add(Arrival(number, unpack(request), time.monotonic()))
        if self._serving is None:
            self._serving = asyncio.create_task(self._serve())

    async def cancel(self, number: int) -> None:
        """Nothing more comes of the request; its rows are free before the next pass."""
        self._open.discard(number)
        self._inbox.cancel(number)

    async def events(self, wait_s: float) -> bytes:
        """(number, event) of requests since the last call; waits up to `wait_s` for the first."""
        return pack(await self._outbox.take(wait_s))

    async def follow(self, number: int) -> None:
        """The request whose trees and verdicts are recorded, where anything is."""
        self._verifier.followed = number

    async def trace(self, goes_on: bool) -> bytes:
        """What was recorded since the last call; recording goes on, or stops."""
        return pack(self._recorder.drain(goes_on=goes_on))

    def _emit(self, number: int, event: Event) -> None:
        if isinstance(event, DraftEnded):
            self._drafter = None
        if number in self._open or isinstance(event, DraftEnded):  # this is for the engine, too
            self._outbox.put(number, event)
        if isinstance(event, Finished | Failed):
            self._open.discard(number)

    async def _serve(self) -> None:
        """A bug of ours must not leave a caller waiting for ever: all requests fail, and the next ones begin anew."""
        while True:
            try:
                await serve(self._inbox, self._drafter, self._verifier, self._first, MonotonicClock(), self._emit)
            except Exception as error:
                broke = Failed.of(failure(f"the coordinator broke: {error!r}", traceback.format_exc()))
                left = tuple(sorted(self._open))
                self._first = replace(self._first, ended=left, ended_for_draft=left)
                for number in left:
                    self._emit(number, broke)
