"""A rate limit on reads, to measure what a slower disk would do."""

import threading
import time
from collections.abc import Callable


class TokenBucket:
    """Lets `rate_bytes_per_s` through, shared by threads; idle time earns at most 50 ms of credit.

    Each taker books the next stretch of the timeline and sleeps until its stretch has passed, so the total is
    exact whatever the number of threads and the size of the extents.
    """

    BURST_S = 0.05

    def __init__(
        self,
        rate_bytes_per_s: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if rate_bytes_per_s <= 0:
            raise ValueError(f"rate must be above 0 bytes/s, got {rate_bytes_per_s}")
        self.rate_bytes_per_s = rate_bytes_per_s
        self._clock, self._sleep = clock, sleep
        self._lock = threading.Lock()
        self._booked_until = clock()

    @property
    def burst_bytes(self) -> int:
        """What may pass at once after idling."""
        return int(self.rate_bytes_per_s * self.BURST_S)

    def take(self, nbytes: int) -> None:
        """Wait until `nbytes` may pass."""
        with self._lock:
            start = max(self._booked_until, self._clock() - self.BURST_S)
            due = self._booked_until = start + nbytes / self.rate_bytes_per_s
        while (wait := due - self._clock()) > 0:
            self._sleep(wait)
