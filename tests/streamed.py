"""Tiny models as the engine streams them, at a fraction of its start: weights from a loader in a process of its own.

The loader's actor, the window in Ray's store, the leases and the verifier's class are the engine's. The verifier, the
draft and the loop run in this process, and one loader process serves job after job.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray

from llmcad_actors.actors.calls import fetch
from llmcad_actors.actors.lean_ray import LocalRay
from llmcad_actors.actors.loader import LoaderActor
from llmcad_actors.actors.verifier import VerifierActor
from llmcad_actors.core.request import Request
from llmcad_actors.core.round import Check, PassReport
from llmcad_actors.messages import ReadingProgress, pack, unpack
from llmcad_actors.plan.job import Prepared
from llmcad_actors.plan.specs import loader_spec, verifier_spec
from tests.actors.engines import job
from tests.test_lossless import Local

TIMEOUT_S = 60.0


class Renewable(LoaderActor):
    """The loader's actor, which can begin anew: the start of a process takes longer than a tiny model's output."""

    def renew(self, spec: bytes) -> None:
        self._loader.close()
        LoaderActor.__init__(self, spec)


class ActorVerifier:
    """The verifier's actor class as a `Verifier`, in this process."""

    def __init__(self, actor: VerifierActor) -> None:
        self._actor = actor

    async def change(self, ended: Sequence[int], joined: Mapping[int, Request]) -> Mapping[int, int]:
        held: Mapping[int, int] = unpack(self._actor.change(pack((tuple(ended), dict(joined)))))
        return held

    async def verify(self, checks: Sequence[Check]) -> PassReport:
        report: PassReport = unpack(self._actor.verify(pack(tuple(checks))))
        return report


class Streaming:
    """A Ray of our own, which engines may use too, and a loader in it."""

    def __init__(self) -> None:
        self._ray = LocalRay(256 << 20)
        self._loader: Any = None

    def local(self, target: Path, draft: Path, **settings: object) -> Local:
        """A job under a cap that pins some shards and streams at least half of the layers."""
        prepared = half_streamed(target, draft, threads=1, dtype="float32", **settings)
        verifier = VerifierActor(pack(verifier_spec(prepared)), self._take(prepared))
        fetch(self._loader.start.remote(), TIMEOUT_S, "the loader's start")
        verifier.pin()
        return Local(prepared, ActorVerifier(verifier))

    def bytes_read(self) -> int:
        """By the loader, for its present job."""
        progress: ReadingProgress = unpack(fetch(self._loader.progress.remote(), TIMEOUT_S, "the loader's progress"))
        return progress.bytes_read

    def close(self) -> None:
        self._ray.close()

    def _take(self, prepared: Prepared) -> Any:
        spec = pack(loader_spec(prepared))
        if self._loader is None:
            self._loader = ray.remote(num_cpus=0, max_restarts=0)(Renewable).remote(spec)
        else:
            fetch(self._loader.renew.remote(spec), TIMEOUT_S, "a new loader")
        return self._loader


def half_streamed(target: Path, draft: Path, **settings: Any) -> Prepared:
    """A job with memory for two of its layers, of four or more."""
    layers = job(target, None, extra_bytes=0, **settings).layout.layers
    prepared = job(target, draft, extra_bytes=sum(spec.nbytes for spec in layers[:2]), **settings)
    num_streamed = sum(spec.name in prepared.memory.streamed for spec in layers)
    assert prepared.memory.pinned
    assert num_streamed >= len(layers) / 2
    return prepared
