"""How a disk is read: by how many threads, in requests of which size. Measured where a disk is met for the first time.

What is found is kept beside the doctor's figures, and `llmcad doctor` measures again, longer.
"""

from collections.abc import Callable
from contextlib import suppress

from llmcad_actors.config import EngineConfig
from llmcad_actors.doctor_disk import Effort, measure_disk, parts_of
from llmcad_actors.doctor_figures import disk_figures_for, keep
from llmcad_actors.doctor_load import LoadWatch
from llmcad_actors.errors import LlmcadError
from llmcad_actors.storage.checkpoint import Checkpoint

READ_THREADS = 2
CHUNK_BYTES = 8 << 20
"""Within 5 % of the fastest on the one disk that was tried; few threads leave the cores to others."""

LEAST_BYTES = 1 << 30
"""A smaller checkpoint is loaded before its disk would be known."""

FIRST_LOOK = Effort(rounds=3, sustained_s=0.5, limit_s=5.0)


def read_settings(config: EngineConfig, target: Checkpoint) -> tuple[int, int]:
    """Threads, and bytes of a request: as the settings say, else as measured, else what is good on most disks."""
    known = disk_figures_for(target.path)
    threads, chunk = (known.threads, known.chunk_bytes) if known else (READ_THREADS, CHUNK_BYTES)
    return config.read_threads or threads, config.chunk_bytes or chunk


def meet_disk(config: EngineConfig, target: Checkpoint, say: Callable[[str], None]) -> None:
    """Measure the disk of a large checkpoint, unless that has been done, or the settings leave nothing to find out."""
    is_asked = not (config.read_threads and config.chunk_bytes) and config.read_limit is None
    if not is_asked or target.total_bytes < LEAST_BYTES or disk_figures_for(target.path):
        return
    say("measuring the disk, this once")
    files = sorted({info.file for info in target.tensors.values()})
    with suppress(LlmcadError, OSError):  # nothing depends on it; a disk that cannot be read shows when it has to be
        watch = LoadWatch(reads_disk=True)
        found = measure_disk(parts_of(files), FIRST_LOOK)
        keep(target.path, found, None, watch.taken())
