"""The draft process: the resident draft model behind an actor.

While a pass is waiting for its tree, the draft works at normal priority. While a pass runs, it works in a thread that
gets only what the others leave (SCHED_IDLE; scheduling is by thread, and a thread that is not root cannot come back).
"""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from llmcad_actors.actors import quiet
from llmcad_actors.actors.library_pages import drop_code
from llmcad_actors.config import DraftSpec
from llmcad_actors.core.builders import make_builder
from llmcad_actors.core.trace import Recorder
from llmcad_actors.messages import pack, unpack
from llmcad_actors.storage.checkpoint import Checkpoint

SLICE_TIMEOUT_S = 300.0


class DraftActor:
    def __init__(self, spec: bytes) -> None:
        # Here, not above: the process that starts the actors knows this class, and has no torch.
        from llmcad_actors.models import thin_imports

        quiet.before_imports()
        thin_imports.install()
        import torch

        from llmcad_actors.kernels.tensors import computing
        from llmcad_actors.models.draft import Draft, DraftModel

        quiet.after_imports()
        setup: DraftSpec = unpack(spec)
        torch.set_num_threads(setup.threads)
        path = Path(setup.path)
        self._checkpoint = Checkpoint.open(path)
        model = DraftModel(
            path,
            dtype=computing(setup.dtype),
            vocab=setup.vocab,
            rows=setup.rows,
            slots=setup.slots,
            children=setup.children,
        )
        builder = make_builder(
            setup.builder,
            max_nodes=setup.max_nodes,
            batch=setup.batch,
            children=setup.children,
            widths=setup.widths,
            sharpens=setup.sharpens,
        )
        self._recorder = Recorder("draft", time.monotonic)
        self._draft = Draft(
            model,
            builder,
            batch=setup.batch,
            max_positions=setup.context,
            max_nodes=setup.max_nodes,
            whole_nodes=setup.whole_nodes,
            recorder=self._recorder,
        )
        self._slice_steps = setup.slice_steps
        self._leftover = ThreadPoolExecutor(max_workers=1, initializer=give_way)
        drop_code()

    def ready(self) -> None:
        """Returns when the actor is up; raises what its construction raised."""

    def grow(self, order: bytes) -> bytes:
        self._checkpoint.check_unchanged()  # the weights are mapped: they would change with the file
        return pack(self._draft.grow(unpack(order)))

    def extend(self) -> bytes:
        return pack(self._leftover.submit(self._draft.extend, self._slice_steps).result(SLICE_TIMEOUT_S))

    def trace(self, goes_on: bool) -> bytes:
        """What was recorded since the last call; recording goes on, or stops."""
        return pack(self._recorder.drain(goes_on=goes_on))


def give_way() -> None:
    """Put the calling thread under SCHED_IDLE, where there is such a thing."""
    if hasattr(os, "SCHED_IDLE"):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
