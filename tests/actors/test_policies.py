"""Every policy with every builder, ahead or not: the target's own output, through the real actors.

Loader, verifier and draft are actors; the decode loop runs here over its ports, so that one set of actors serves any
policy.
"""

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import ray
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmcad_actors.actors.calls import Line, fetch
from llmcad_actors.actors.coordinator import MonotonicClock, RemoteDrafter, RemoteVerifier
from llmcad_actors.actors.draft import DraftActor
from llmcad_actors.actors.lean_ray import LocalRay
from llmcad_actors.actors.runtime import start_actors
from llmcad_actors.config import DraftSpec
from llmcad_actors.core.builders import make_builder
from llmcad_actors.core.fallback import (
    AdaptiveConfidence,
    FixedDepth,
    FixedTree,
    MarginalThroughput,
    Policy,
    TokenConfidence,
)
from llmcad_actors.core.request import Request
from llmcad_actors.core.rounds import Limits, Rounds
from llmcad_actors.core.stats import Stats
from llmcad_actors.core.worth import Worth
from llmcad_actors.messages import Event, Tokens, pack, unpack
from llmcad_actors.plan.job import Prepared
from llmcad_actors.plan.prediction import first_costs
from llmcad_actors.plan.specs import draft_spec, loader_spec, policy_of, verifier_spec
from llmcad_actors.tools.bundled import bundled_draft, bundled_target
from tests.actors.engines import job
from tests.fakes import decode
from tests.family_cases import CASES
from tests.plain import Plain, encode
from tests.tiny import PROMPTS

COUNT = 24
FIXED = (1, 3, 2, 1, 1, 1)
BUILDERS = ("best-first", "pacer", "fixed")
MARGINAL = MarginalThroughput(worth=Worth(plain_s=1e6, num_plain=9))
"""Drafting pays: how long these tiny models take beside the calls to them is not the question here."""
POLICIES: tuple[st.SearchStrategy[Policy], ...] = (
    st.just(MARGINAL),
    st.builds(AdaptiveConfidence, st.floats(0.001, 0.9), st.sampled_from(["power", "average"])),
    st.builds(FixedDepth, st.integers(1, 12)),
    st.just(FixedTree()),
    st.builds(TokenConfidence, st.floats(0.05, 0.99), st.integers(1, 16)),
)


class AnyBuilder(DraftActor):
    """The draft's actor, which can go on with another builder: the start of a process takes longest."""

    def __init__(self, spec: bytes) -> None:
        super().__init__(spec)
        self._spec: DraftSpec = unpack(spec)

    def use(self, builder: str) -> None:
        """From the next request on."""
        spec = self._spec
        self._draft._builder = make_builder(
            builder,
            max_nodes=spec.max_nodes,
            batch=spec.batch,
            children=spec.children,
            widths=FIXED,
            sharpens=spec.sharpens,
        )


class Actors:
    """One target and one draft."""

    def __init__(self, line: Line, prepared: Prepared, stack: ExitStack) -> None:
        self.path, self._prepared = prepared.target.path, prepared
        actors = start_actors(
            line,
            loader_spec(prepared),
            verifier_spec(prepared),
            None,
            policy_of(prepared),
            first_costs(prepared),
            Limits(),
            lambda what: None,
        )
        stack.callback(actors.close)
        self._verifier = RemoteVerifier(actors.verifier.handle)
        self._draft = ray.remote(num_cpus=0)(AnyBuilder).remote(pack(draft_spec(prepared)))
        stack.callback(_end, self._draft)
        fetch(self._draft.ready.remote(), 120, "the draft's start")

    def generate(
        self, ids: tuple[int, ...], builder: str, policy: Policy, *, provisional: bool
    ) -> tuple[tuple[int, ...], Stats]:
        fetch(self._draft.use.remote(builder), 60, "another builder")
        events: list[Event] = []
        request = Request(ids, COUNT, self._prepared.stop_tokens, provisional=provisional)
        learnt, clock = Rounds(policy, first_costs(self._prepared)), MonotonicClock()
        asyncio.run(decode(request, RemoteDrafter(self._draft), self._verifier, learnt, clock, events.append))
        found = [event for event in events if isinstance(event, Tokens)]
        return tuple(i for event in found for i in event.ids), found[-1].stats


def _end(actor: Any) -> None:
    with suppress(Exception):
        ray.kill(actor)


@pytest.fixture(scope="module")
def local_ray() -> Iterator[LocalRay]:
    local = LocalRay(256 << 20)
    yield local
    local.close()


def random_pair(folder: Path) -> Prepared:
    """A random target, streamed as a whole, and itself with noise on its weights as the draft."""
    case = CASES["llama"]
    target, draft = case.save(folder / "target"), case.save(folder / "draft", noise=0.05)
    return job(target, draft, max_nodes=16, dtype="float32")


def bundled_pair(folder: Path) -> Prepared:
    return job(bundled_target(), bundled_draft(), max_nodes=48, dtype="float32", extra_bytes=20_000_000)


@pytest.fixture(scope="module", params=[random_pair, bundled_pair], ids=lambda make: make.__name__)
def actors(
    local_ray: LocalRay, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Actors]:
    with ExitStack() as stack:
        yield Actors(Line(local_ray.line.log), request.param(tmp_path_factory.mktemp("pair")), stack)


@settings(max_examples=8, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(
    prompt=st.sampled_from(PROMPTS),
    builder=st.sampled_from(BUILDERS),
    policy=st.one_of(*POLICIES),
    provisional=st.booleans(),
)
def test_the_output_is_greedy_generation(
    actors: Actors, prompt: str, builder: str, policy: Policy, provisional: bool
) -> None:
    ids = encode(actors.path, prompt)
    found, stats = actors.generate(ids, builder, policy, provisional=provisional)
    assert found == Plain.of(actors.path).greedy(ids, COUNT)
    assert stats.accepted_tokens + stats.target_passes >= len(found)
    assert stats.draft_steps > 0 and stats.verified_nodes > 0


def test_a_draft_that_is_often_right_saves_passes_under_every_policy(actors: Actors) -> None:
    ids = encode(actors.path, PROMPTS[1])
    for policy in (
        MARGINAL,
        AdaptiveConfidence(),
        FixedDepth(4),
        FixedTree(),
        TokenConfidence(),
    ):
        builder = "fixed" if isinstance(policy, FixedDepth | FixedTree) else "best-first"
        found, stats = actors.generate(ids, builder, policy, provisional=True)
        assert stats.target_passes < 0.8 * len(found), policy
