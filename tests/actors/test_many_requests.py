"""Requests that share passes, through the real actors: each text is what it is alone, and every row comes back."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcad_actors import Engine, Generation
from llmcad_actors.actors.calls import fetch
from llmcad_actors.actors.lean_ray import LocalRay
from llmcad_actors.errors import ConfigError, DeadlineError, EngineBusyError, EngineClosedError
from llmcad_actors.plan.job import Prepared
from llmcad_actors.tools.bundled import bundled_draft, bundled_target
from tests.actors.engines import MB, job
from tests.tiny import tiny_llama

DEADLINE_S = 60.0
TEXTS = (
    "import json\n\n\ndef load(path):\n    ",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "def area(r):\n",
    "# " + "a long comment that says little, and says it again\n# " * 30,
)
CHOICES: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.8, "seed": 1},
    {"temperature": 1.0, "top_p": 0.9, "seed": 2},
    {"frequency_penalty": 0.5, "logprobs": 2},
)


def bundled(folder: Path) -> Prepared:
    """The bundled pair, trees in every pass; room for some of these texts at once."""
    return job(bundled_target(), bundled_draft(), extra_bytes=60 * MB, fallback="adaptive", max_context=1024)


def streamed(folder: Path) -> Prepared:
    """A random target, streamed, with a draft that is another."""
    target = tiny_llama(folder / "target", seed=1, max_file="100KB", context=2048)
    draft = tiny_llama(folder / "draft", seed=2, layers=1, context=2048)
    return job(target, draft, max_nodes=24, overlaps=False, fallback="adaptive", max_context=2048)


@pytest.fixture(scope="module")
def local_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMCAD_CACHE", str(tmp_path_factory.mktemp("cache")))
        local = LocalRay(256 << 20)
        yield
        local.close()


@pytest.fixture(scope="module", params=[bundled, streamed], ids=lambda make: make.__name__)
def engine(
    local_ray: None, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    make: Callable[[Path], Prepared] = request.param
    with Engine.start(make(tmp_path_factory.mktemp(make.__name__))) as engine:
        yield engine
        assert rows_of(engine) == 0


def rows_of(engine: Engine) -> int:
    """Rows of keys and values that requests hold, once those that ended have given theirs back."""
    until = time.monotonic() + DEADLINE_S
    while (rows := fetch(engine._actors.verifier.num_rows.remote(), DEADLINE_S, "rows")) and time.monotonic() < until:
        time.sleep(0.05)
    return int(rows)


_ALONE: dict[tuple[int, str, int, int], tuple[int, ...]] = {}


def alone(engine: Engine, text: str, choice: int, count: int) -> tuple[int, ...]:
    """What the request says with nobody beside it, one token a pass."""
    key = id(engine), text, choice, 24
    if key not in _ALONE:
        _ALONE[key] = engine.generate(text, max_new_tokens=24, speculate=False, **CHOICES[choice]).token_ids
    return _ALONE[key][:count]


asked = st.tuples(
    st.sampled_from(TEXTS),
    st.integers(0, len(CHOICES) - 1),
    st.integers(1, 24),
    st.one_of(st.none(), st.none(), st.integers(0, 5)),  # cancelled after so many pieces
    st.sampled_from([0.0, 0.0, 0.01, 0.1]),  # seconds before the next one comes
)


@settings(max_examples=8, deadline=None)
@given(requests=st.lists(asked, min_size=2, max_size=12))
def test_a_text_is_its_own_whoever_comes_and_goes(engine: Engine, requests: list[tuple[Any, ...]]) -> None:
    expected = [alone(engine, text, choice, count) for text, choice, count, _, _ in requests]
    generations = list[Generation]()
    for text, choice, count, _, pause in requests:
        generations.append(engine.submit(text, max_new_tokens=count, **CHOICES[choice]))
        time.sleep(pause)
    for generation, ids, (*_, cancelled, _) in zip(generations, expected, requests, strict=True):
        if cancelled is None:
            result = generation.result()
            assert result.token_ids == ids
            assert result.finish_reason in ("length", "stop")
        else:
            found: tuple[int, ...] = ()
            for number, piece in enumerate(generation):
                found += piece.token_ids
                if number >= cancelled:
                    break
            generation.cancel()
            assert found == ids[: len(found)]
    assert rows_of(engine) == 0


def test_samples_of_a_prompt_are_what_their_seeds_say(engine: Engine) -> None:
    samples = engine.samples(TEXTS[1], 3, temperature=1.0, seed=7, max_new_tokens=8)
    found = [each.result() for each in samples]
    assert [each.seed for each in found] == [7, 8, 9]
    for result in found:
        again = engine.generate(TEXTS[1], temperature=1.0, seed=result.seed, max_new_tokens=8, speculate=False)
        assert again.token_ids == result.token_ids
    assert len({each.token_ids for each in found}) == 3


def test_coroutines_share_passes_too(engine: Engine) -> None:
    async def read(text: str) -> tuple[int, ...]:
        ids: tuple[int, ...] = ()
        async for piece in await engine.asubmit(text, max_new_tokens=12):
            ids += piece.token_ids
        return ids

    async def read_all() -> list[tuple[int, ...]]:
        return await asyncio.wait_for(asyncio.gather(*map(read, TEXTS[:3])), DEADLINE_S)

    assert asyncio.run(read_all()) == [alone(engine, text, 0, 12) for text in TEXTS[:3]]


def test_a_thread_that_dies_while_it_reads_frees_its_rows(engine: Engine) -> None:
    def read() -> None:
        for _ in engine.stream(TEXTS[0], max_new_tokens=600):
            raise ArithmeticError

    def die() -> None:
        with suppress(ArithmeticError):
            read()

    threads = [threading.Thread(target=die, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert rows_of(engine) == 0
    assert engine.generate(TEXTS[2], max_new_tokens=6).token_ids == alone(engine, TEXTS[2], 0, 6)


def test_a_request_longer_than_the_plan_is_refused_and_says_why(engine: Engine) -> None:
    context = engine.prepared.context
    with pytest.raises(ConfigError, match=rf"takes at most {context} in all"):
        engine.submit("x = 1\n" * context)
    with pytest.raises(ConfigError, match="the target has no token 1000000"):
        engine.submit("x", logit_bias={10**6: 1.0})


@cache
def _slow(folder: Path) -> Prepared:
    target = tiny_llama(folder / "slow", seed=4)
    return job(target, None, max_requests=1, max_queue=2, read_limit="1MB/s", chunk_bytes=4096, extent_bytes=20_000)


def test_a_queue_that_is_full_says_so_and_one_who_waits_for_too_long_is_told(local_ray: None, tmp_path: Path) -> None:
    with Engine.start(_slow(tmp_path)) as engine:
        first = engine.submit("a", max_new_tokens=50)
        late = engine.submit("b", queue_timeout=0.1)
        last = engine.submit("c", max_new_tokens=50)
        with pytest.raises(EngineBusyError, match=r"3 requests run or wait, and no more may; .* larger max_queue"):
            engine.submit("d")
        with pytest.raises(DeadlineError, match="waited for longer than it was given"):
            late.result()
        first.cancel()
        assert next(iter(last)).token_ids
        waiting = engine.submit("e")
    for generation in (last, waiting):
        with pytest.raises(EngineClosedError):
            generation.result()
    assert first.result().finish_reason == "cancelled"
