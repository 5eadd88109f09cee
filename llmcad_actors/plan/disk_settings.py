"""How a disk is read: by how many threads, in requests of which size. As `llmcad doctor` found it to be fastest."""

from llmcad_actors.config import EngineConfig
from llmcad_actors.machine.figures import disk_figures_for
from llmcad_actors.storage.checkpoint import Checkpoint

READ_THREADS = 2
CHUNK_BYTES = 8 << 20
"""Within 5 % of the fastest on the one disk that was tried; few threads leave the cores to others."""

LEAST_BYTES = 1 << 30
"""Of a smaller checkpoint little is read."""


def read_settings(config: EngineConfig, target: Checkpoint) -> tuple[int, int]:
    """Threads, and bytes of a request: as the settings say, else as measured, else what is good on most disks."""
    known = disk_figures_for(target.path)
    threads, chunk = (known.threads, known.chunk_bytes) if known else (READ_THREADS, CHUNK_BYTES)
    return config.read_threads or threads, config.chunk_bytes or chunk


def unmeasured(config: EngineConfig, target: Checkpoint) -> tuple[str, ...]:
    """A notice of a disk that nothing is known of, where a large checkpoint is read as suits most disks."""
    is_set = bool(config.read_threads and config.chunk_bytes) or config.read_limit is not None
    if is_set or target.total_bytes < LEAST_BYTES or disk_figures_for(target.path):
        return ()
    return ("this disk has not been measured: run `llmcad doctor` once, and reads and predictions will suit it",)
