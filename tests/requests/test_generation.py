"""A request as its caller holds it: pieces come to threads and coroutines, and whatever breaks ends the wait."""

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from llmcad_actors.core.request import Request
from llmcad_actors.core.stats import Stats
from llmcad_actors.errors import DeadlineError, EngineClosedError, LlmcadError, RuntimeFailure
from llmcad_actors.messages import DraftEnded, Event, Failed, Finished, Provisional, Tokens
from llmcad_actors.requests.dispatcher import Dispatcher
from llmcad_actors.requests.generation import Generation
from llmcad_actors.requests.options import RequestOptions
from llmcad_actors.text.tokenizer import Detokenizer
from tests.tiny import byte_tokenizer

DEADLINE_S = 30.0
TOKENIZER = byte_tokenizer().backend_tokenizer
IDS = tuple(TOKENIZER.encode("hello you").ids)


def stats(count: int) -> Stats:
    return Stats(new_tokens=count, target_passes=1)


@dataclass
class World:
    """What an engine does for its requests; `say` is what the coordinator tells."""

    told: list[tuple[int, Event]] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)
    error: LlmcadError | None = None
    draft_ended: int = 0

    def __post_init__(self) -> None:
        self._came = threading.Condition()
        self.dispatcher = Dispatcher(self.poll, lambda error: error, self.end_draft)

    def poll(self) -> Sequence[tuple[int, Event]]:
        with self._came:
            self._came.wait_for(lambda: self.told or self.error, 0.05)
            events, self.told, error, self.error = self.told, [], self.error, None
        if error is not None:
            raise error
        return events

    def say(self, *events: tuple[int, Event]) -> None:
        with self._came:
            self.told += events
            self._came.notify_all()

    def end_draft(self) -> None:
        self.draft_ended += 1

    def request(self, number: int, **options: Any) -> Generation:
        asked, request = RequestOptions("x", options), Request((1,), 20, ())
        detokenizer = Detokenizer(TOKENIZER, ())
        generation = Generation(number, request, asked, detokenizer, self.cancel, lambda _, stats: stats)
        self.dispatcher.add(generation)
        return generation

    def cancel(self, generation: Generation) -> None:
        self.cancelled.append(generation.number)
        self.dispatcher.remove(generation)


@pytest.fixture
def world() -> Any:
    world = World()
    yield world
    world.dispatcher.close()
    world.dispatcher.join(DEADLINE_S)


def test_each_request_gets_its_own_events_in_their_order(world: World) -> None:
    one, two = world.request(1), world.request(2, provisional=True)
    world.say((1, Provisional(IDS[:1])), (2, Provisional(IDS[:2])), (2, Tokens(IDS[:3], stats(3))))
    world.say((9, Tokens(IDS, stats(9))), (1, Tokens(IDS[:5], stats(5))), (1, Finished("length", stats(5))))
    world.say((2, Tokens(IDS[3:], stats(9))), (2, Finished("stop", stats(9))))
    assert one.result().text == "hello"
    assert [(piece.text, piece.provisional) for piece in two] == [("he", True), ("hel", False), ("lo you", False)]
    assert (two.result().text, two.result().finish_reason, two.stats.new_tokens) == ("hello you", "stop", 9)
    assert list(two) == []
    assert not world.dispatcher.num_open and not world.cancelled


def test_a_stop_string_ends_the_request_though_nobody_reads(world: World) -> None:
    generation = world.request(1, stop="lo")
    world.say((1, Tokens(IDS, stats(9))))
    result = generation.result()
    assert (result.text, result.finish_reason) == ("hel", "stop")
    assert world.cancelled == [1]


def test_a_cancelled_request_keeps_what_it_has_and_hears_no_more(world: World) -> None:
    generation = world.request(1)
    world.say((1, Tokens(IDS[:3], stats(3))))
    assert next(iter(generation)).text == "hel"
    generation.cancel()
    generation.cancel()
    world.say((1, Tokens(IDS[3:], stats(9))))
    assert (generation.result().text, generation.result().finish_reason) == ("hel", "cancelled")
    assert world.cancelled == [1]
    with world.request(2) as left:
        pass
    assert left.has_ended and world.cancelled == [1, 2]


def test_what_breaks_one_request_or_all_is_raised_where_they_are_waited_for(world: World) -> None:
    one, two, three = (world.request(number) for number in (1, 2, 3))
    world.say((1, Tokens(IDS[:2], stats(2))), (1, Failed("DeadlineError", "a pass did not come")))
    pieces = list[str]()
    with pytest.raises(DeadlineError, match="a pass did not come"):
        for piece in one:
            pieces.append(piece.text)
    assert pieces == ["he"]
    world.say((2, Tokens(("no id",), stats(1))))  # type: ignore[arg-type]
    with pytest.raises(RuntimeFailure, match="the engine broke: "):
        two.result()
    world.error = RuntimeFailure("the coordinator died")
    with pytest.raises(RuntimeFailure, match="the coordinator died"):
        three.result()
    four = world.request(4)
    world.dispatcher.close()
    with pytest.raises(EngineClosedError):
        four.result()


def test_the_end_of_the_draft_is_told_though_its_request_is_gone(world: World) -> None:
    generation = world.request(2)
    world.say((1, DraftEnded()), (2, Tokens(IDS, stats(9))), (2, Finished("length", stats(9))))
    generation.result()
    assert world.draft_ended == 1


def test_coroutines_of_several_loops_wait_without_blocking(world: World) -> None:
    generations = [world.request(number) for number in range(1, 5)]

    async def read(generation: Generation) -> str:
        return "".join([piece.text async for piece in generation])

    async def read_two(first: int) -> list[str]:
        asyncio.get_running_loop().call_later(0.05, say)
        return await asyncio.wait_for(asyncio.gather(*map(read, generations[first : first + 2])), DEADLINE_S)

    def say() -> None:
        for number in range(1, 5):
            world.say((number, Tokens(IDS, stats(9))), (number, Finished("length", stats(9))))

    assert asyncio.run(read_two(0)) == ["hello you"] * 2
    assert asyncio.run(read_two(2)) == ["hello you"] * 2
    with pytest.raises(DeadlineError):
        late = world.request(7)
        world.say((7, Failed("DeadlineError", "too late")))
        asyncio.run(read(late))
