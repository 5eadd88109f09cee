"""The actors: wrapped once, started in order, ended together."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray

from llmcad_actors.actors.calls import Line, Remote, fetch
from llmcad_actors.actors.coordinator import Coordinator
from llmcad_actors.actors.draft import DraftActor
from llmcad_actors.actors.loader import LoaderActor
from llmcad_actors.actors.verifier import VerifierActor
from llmcad_actors.config import DraftSpec, LoaderSpec, VerifierSpec
from llmcad_actors.core.costs import CostModel
from llmcad_actors.core.fallback import Policy
from llmcad_actors.core.rounds import Limits
from llmcad_actors.messages import pack

START_TIMEOUT_S = 180.0
PIN_TIMEOUT_S = 3600.0


@dataclass
class Actors:
    """The running actors, to be called from the process that started them."""

    line: Line
    loader: Remote
    verifier: Remote
    draft: Remote | None
    coordinator: Remote
    has_ended_draft: bool = False

    def all(self) -> list[Remote]:
        return [a for a in (self.coordinator, self.draft, self.verifier, self.loader) if a is not None]

    def end_draft(self) -> None:
        """End the draft alone. May be called again."""
        if self.draft is not None:
            draft, self.draft, self.has_ended_draft = self.draft, None, True
            draft.kill()

    def close(self) -> None:
        """End them. No call reaches them, or Ray, any more."""
        self.line.end(self.all())


def start_actors(
    line: Line,
    loader: LoaderSpec,
    verifier: VerifierSpec,
    draft: DraftSpec | None,
    policy: Policy,
    costs: CostModel,
    limits: Limits,
    say: Callable[[str], None],
) -> Actors:
    """Start the actors and pin what is to stay; returns when all are ready. Raises what an actor raised.

    `say` is told what is being waited for.
    """
    with line.inside():
        load = _remote(LoaderActor).remote(pack(loader))
        verify = _remote(VerifierActor).remote(pack(verifier), load)
        drafting = _remote(DraftActor).remote(pack(draft)) if draft is not None else None
        coordinate = _remote(Coordinator).remote(
            verify, drafting, pack(policy), pack(costs), pack((limits.max_requests, limits.rows))
        )
    of_draft = Remote(line, drafting) if drafting is not None else None
    actors = Actors(line, Remote(line, load), Remote(line, verify), of_draft, Remote(line, coordinate))
    try:
        _await_ready(actors, say)
    except BaseException:
        actors.close()
        raise
    return actors


def _remote(kind: type) -> Any:
    return ray.remote(num_cpus=0, max_restarts=0)(kind)


def _await_ready(actors: Actors, say: Callable[[str], None]) -> None:
    say("starting the loader")
    fetch(actors.loader.start.remote(), START_TIMEOUT_S, "the loader's start")
    say("building the target's skeleton")
    fetch(actors.verifier.ready.remote(), START_TIMEOUT_S, "the verifier's start")
    if actors.draft is not None:
        say("loading the draft")
        fetch(actors.draft.ready.remote(), START_TIMEOUT_S, "the draft's start")
    say("pinning layers")
    fetch(actors.verifier.pin.remote(), PIN_TIMEOUT_S, "pinning layers")
    fetch(actors.coordinator.ready.remote(), START_TIMEOUT_S, "the coordinator's start")
