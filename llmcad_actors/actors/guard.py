"""Self-defence: from samples of memory to orders for the verifier, which gives up pinned shards or takes them back."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from llmcad_actors.actors.calls import fetch
from llmcad_actors.core.shedding import MemorySample, Shedding
from llmcad_actors.errors import LlmcadError
from llmcad_actors.machine.limits import FreeMemory, free_memory

ORDER_TIMEOUT_S = 10.0  # of an order that has been carried out


class Guard:
    """Looks at every sample of the memory watcher. An order is carried out between passes; until then none follows."""

    def __init__(
        self,
        verifier: Any,
        sizes: Sequence[int],
        cap_bytes: int,
        free: Callable[[], FreeMemory] = free_memory,
        later: Sequence[int] = (),
    ) -> None:
        """`sizes`: bytes of the pinned shards; `free`: looks at the machine, or its cgroup.

        later: bytes of the shards that are pinned once the draft has ended, in their order.
        """
        self._verifier = verifier
        self._policy = Shedding.of(sorted(sizes, reverse=True), later)
        self._has_draft_ended = False
        self._held_now = self._policy.held
        self._passes = 0
        self._cap = cap_bytes
        self._free = free
        self._order: Any = None
        self.num_shed = 0  # shards given up, so far

    def look(self, used_bytes: int) -> bool:
        """One sample: what llmcad uses now. Returns whether shards are still on their way out."""
        if self._is_carried_out():
            self._decide(used_bytes)
        return self._policy.held < self._held_now

    def draft_has_ended(self) -> None:
        """From the next sample on there is room for more. From any thread."""
        self._has_draft_ended = True

    def _decide(self, used_bytes: int) -> None:
        if self._has_draft_ended and self._policy.later:
            self._policy = self._policy.without_draft()
        machine = self._free()
        sample = MemorySample(used_bytes, self._cap, machine.free_bytes, machine.limit_bytes)
        before = self._policy
        if sample.room < 0 or self._held_now == before.held:  # what is to come back has come
            self._policy = before.after(sample, self._passes)
        self.num_shed += max(0, before.held - self._policy.held)
        if self._policy.held != before.held or self._held_now < before.most:
            with suppress(LlmcadError):  # the engine is being closed
                self._order = self._verifier.hold.remote(self._policy.held)

    def _is_carried_out(self) -> bool:
        if self._order is None:
            return True
        try:
            if not self._order.is_done():
                return False
            order, self._order = self._order, None
            self._held_now, self._passes = fetch(order, ORDER_TIMEOUT_S, "giving up pinned shards")
        except LlmcadError:  # a dead verifier is told of where its passes are waited for
            return False
        return True
