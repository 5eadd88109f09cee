"""The verifier process: the streamed target behind an actor. A method unpacks, calls, returns."""

import time
from pathlib import Path
from typing import Any

from llmcad_actors.actors import quiet
from llmcad_actors.actors.library_pages import drop_code
from llmcad_actors.actors.shards import LeasedShards
from llmcad_actors.actors.traced import TracedShards
from llmcad_actors.config import VerifierSpec
from llmcad_actors.core.trace import Recorder
from llmcad_actors.messages import pack, unpack
from llmcad_actors.storage.checkpoint import Checkpoint
from llmcad_actors.storage.layout import layout_of


class VerifierActor:
    def __init__(self, spec: bytes, loader: Any) -> None:
        # Here, not above: the process that starts the actors knows this class, and has no torch.
        from llmcad_actors.models import thin_imports

        quiet.before_imports()
        thin_imports.install()
        import torch

        from llmcad_actors.kernels.tensors import computing
        from llmcad_actors.models.target import Target

        quiet.after_imports()
        setup: VerifierSpec = unpack(spec)
        torch.set_num_threads(setup.threads)
        checkpoint = Checkpoint.open(Path(setup.path))
        layout = layout_of(checkpoint)
        names, encoder = ([spec.name for spec in specs] for specs in (layout.shards, layout.encoder))
        self._source = LeasedShards.of(loader, names, encoder)
        self._pinned = [spec for spec in layout.shards if spec.name in setup.pinned]
        self._pinned_later = setup.pinned_later
        self._num_passes = 0
        self._recorder = Recorder("verifier", time.monotonic)
        source = TracedShards(self._source, self._recorder)
        self._target = Target(
            checkpoint,
            layout,
            source,
            dtype=computing(setup.dtype),
            capacity=setup.capacity,
            max_nodes=setup.max_nodes,
            prefill_chunk=setup.prefill_chunk,
        )
        drop_code()

    def ready(self) -> None:
        """Returns when the actor is up; raises what its construction raised."""

    def pin(self) -> int:
        """Take the pinned shards from the loader; returns their bytes."""
        return self._source.pin(self._pinned, self._pinned_later)

    def hold(self, count: int) -> tuple[int, int]:
        """Hold so many of the shards that may be pinned; returns how many are held now, and the passes so far.

        An actor does one thing at a time: this comes between passes.
        """
        return self._source.hold(count), self._num_passes

    def change(self, change: bytes) -> bytes:
        """Requests end, and others begin: their numbers, and how many tokens of each prompt are held already."""
        ended, joined = unpack(change)
        for number in ended:
            self._target.end(number)
        return pack({number: self._target.begin(number, request) for number, request in joined.items()})

    def verify(self, checks: bytes) -> bytes:
        started = self._recorder.now()
        report = self._target.verify(unpack(checks))
        self._recorder.add("pass", started, rows=report.stats.rows)
        self._num_passes += 1
        return pack(report)

    def num_rows(self) -> int:
        """Rows of the cache that running requests hold."""
        return self._target.num_rows

    def forget(self) -> None:
        self._target.forget()

    def logits_after(self, request: bytes, output: bytes, tokens: bytes) -> bytes:
        """Of a few tokens: whole rows of logits never leave this process."""
        return pack(self._target.logits_after(unpack(request), unpack(output), unpack(tokens)))

    def trace(self, goes_on: bool) -> bytes:
        """What was recorded since the last call; recording goes on, or stops."""
        return pack(self._recorder.drain(goes_on=goes_on))
