"""How much of the disk does plain streaming use? Bare O_DIRECT reads of the same bytes against llmcad's passes.

    python -m benchmarks.streaming [--target demo] [--memory 1.5GB] [--runs 5]
    python -m benchmarks.streaming --threads 1,2,4 --chunk 1MiB,8MiB --read-limit none,400MB/s [--png sweep.png]

Both read the streamed shards of the same plan, with as many threads and the same chunks; they take turns, because
disks change their mind from minute to minute. The first pass of a run is left out: it finds the window full. Of
options with several values every combination is run: targets (their shards differ in size), caps, threads, chunks,
extents (what is read of a shard in one go, and the part of the window that is not whole shards) and read limits.
"""

import itertools
import statistics
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common import Spread, emit, measurement, model_paths
from llmcad_actors.cli.commands import reports_errors
from llmcad_actors.config import EngineConfig
from llmcad_actors.core.budget import parse_size
from llmcad_actors.engine import Engine
from llmcad_actors.errors import ConfigError
from llmcad_actors.plan.job import Prepared
from llmcad_actors.plan.prepare import prepare
from llmcad_actors.plan.specs import loader_spec
from llmcad_actors.storage.extents import Extent, extents_of
from llmcad_actors.storage.reader import AlignedBuffer, ParallelReader, TokenBucket, buffer_bytes

PROMPT = "def read_lines(path):\n    "
NUM_BUFFERS = 12  # several for each thread: the bare reader never waits for one
READ_TIMEOUT_S = 600.0
NONE = "none"


@dataclass(frozen=True, slots=True)
class Run:
    """Bytes per second: the disk by itself, then llmcad."""

    raw: float
    llmcad: float
    stall_share: float  # of llmcad's passes
    is_direct: bool

    @property
    def ratio(self) -> float:
        return self.llmcad / self.raw


def measure(job: Prepared, engine: Engine, passes: int) -> Run:
    await_idle_disk(engine)
    raw, is_direct = raw_rate(job, passes)
    llmcad, stall_share = streaming_rate(engine, passes)
    return Run(raw, llmcad, stall_share, is_direct)


def await_idle_disk(engine: Engine) -> None:
    """The loader reads ahead until its window is full."""
    before, now = -1, engine.status().bytes_read
    while now != before:
        time.sleep(0.5)
        before, now = now, engine.status().bytes_read


def raw_rate(job: Prepared, passes: int) -> tuple[float, bool]:
    """Bytes per second of reading the streamed shards `passes` times, and whether the page cache was bypassed."""
    spec = loader_spec(job)
    extents = [p for s in job.layout.shards if s.name in job.memory.streamed for p in extents_of(s, spec.extent_bytes)]
    size = buffer_bytes(max(extent.nbytes for extent in extents))
    buffers = deque(AlignedBuffer(size, populate=True) for _ in range(NUM_BUFFERS))
    limit = TokenBucket(spec.rate_limit) if spec.rate_limit else None
    with ParallelReader(spec.threads, spec.chunk_bytes, limit) as reader:
        started = time.perf_counter()
        total = _read_all(reader, itertools.chain.from_iterable([extents] * passes), buffers)
        return total / (time.perf_counter() - started), reader.direct


def _read_all(reader: ParallelReader, extents: "itertools.chain[Extent]", buffers: deque[AlignedBuffer]) -> int:
    total, pending = 0, deque[tuple[Any, AlignedBuffer]]()
    for extent in extents:
        if not buffers:
            read, buffer = pending.popleft()
            read.wait(READ_TIMEOUT_S)
            buffers.append(buffer)
        buffer = buffers.popleft()
        pending.append((reader.submit(extent.file, extent.offset, extent.nbytes, buffer), buffer))
        total += extent.nbytes
    for read, _ in pending:
        read.wait(READ_TIMEOUT_S)
    return total


def streaming_rate(engine: Engine, passes: int) -> tuple[float, float]:
    """Streamed bytes per second over `passes` passes after the first, and the share of the time spent stalling."""
    times, stalls = [], []
    for _ in engine.stream(PROMPT, max_new_tokens=passes + 1, speculate=False):
        times.append(engine.stats.seconds)
        stalls.append(engine.stats.stall_seconds)
    if len(times) < 2:
        raise SystemExit("the model ended its text at once; nothing to measure")
    seconds = times[-1] - times[0]
    num_bytes = engine.prepared.memory.bytes_per_pass * (engine.stats.target_passes - 1)
    return num_bytes / seconds, (stalls[-1] - stalls[0]) / seconds


def bench(settings: Mapping[str, Any], runs: int, passes: int) -> tuple[list[Run], dict[str, Any]]:
    """One combination: its runs, and its JSON line."""
    chosen = {name: value for name, value in settings.items() if value is not None}
    path, _ = model_paths(chosen.pop("target"))
    job = prepare(EngineConfig(target=str(path), **chosen))
    if not job.memory.streamed:
        raise SystemExit(f"nothing is streamed of {path} at --memory {settings['memory']}: give less")
    with Engine.start(job) as engine:
        engine.generate(PROMPT, max_new_tokens=1, speculate=False)
        measured = [measure(job, engine, passes) for _ in range(runs)]
    spec = loader_spec(job)
    values = {
        "ratio": Spread.of([run.ratio for run in measured]),
        "raw_bytes_per_s": Spread.of([run.raw for run in measured]),
        "llmcad_bytes_per_s": Spread.of([run.llmcad for run in measured]),
        "stall_share": Spread.of([run.stall_share for run in measured]),
        "bytes_per_pass": job.memory.bytes_per_pass,
        "target_bytes": job.target.total_bytes,
        "largest_shard_bytes": max(shard.nbytes for shard in job.layout.shards),
        "window_bytes": job.memory.window_bytes,
    }
    direct = all(run.is_direct for run in measured)
    cache_state = "O_DIRECT: the page cache is not used" if direct else "buffered; pages are dropped once read"
    config = {**settings, "read_threads": spec.threads, "chunk_bytes": spec.chunk_bytes, "passes": passes}
    return measured, measurement("streaming", values, config=config, cache_state=cache_state)


def combinations(**values: str) -> list[dict[str, Any]]:
    """Every combination of the values, which stand with commas between them; `none` is a setting's default."""
    split = [[None if value == NONE else value for value in text.split(",")] for text in values.values()]
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*split)]


def number(text: str, option: str) -> int:
    """Raises `ConfigError`."""
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{option}: {text!r} is not a number; give some, such as 1,2,4") from None


def labels(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """What each combination has that another has not."""
    varied = [name for name in settings[0] if len({each[name] for each in settings}) > 1]
    return ["\n".join(f"{name} {each[name] or NONE}" for name in varied) for each in settings]


def draw(names: Sequence[str], measured: Sequence[Sequence[Run]], png: Path) -> None:
    """Medians of both rates as bars, one pair for each combination, with what their quotient is."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(max(5, 1.3 * len(names) + 2), 4.5), layout="constrained")
    for offset, name in ((-0.2, "raw"), (0.2, "llmcad")):
        rates = [statistics.median(getattr(run, name) for run in runs) / 1e9 for runs in measured]
        bars = axes.bar([i + offset for i in range(len(names))], rates, 0.4, label=name)
    axes.bar_label(bars, [f"{statistics.median(run.ratio for run in runs):.2f}" for runs in measured])
    axes.set_xticks(range(len(names)), names, fontsize=7)
    axes.set(ylabel="GB/s", title="bare O_DIRECT reads, and passes of llmcad, in turn")
    axes.legend()
    figure.savefig(png, dpi=150)


@reports_errors
def main(
    target: Annotated[str, typer.Option(help="Model directories, `demo` or `bundled`.")] = "demo",
    memory: Annotated[str, typer.Option(help="Memory caps: they decide what is streamed.")] = "1.5GB",
    threads: Annotated[str, typer.Option(help="Reading threads; none: what suits the disk.")] = NONE,
    chunk: Annotated[str, typer.Option(help="Sizes of one read request; none: what suits the disk.")] = NONE,
    extent: Annotated[str, typer.Option(help="Sizes of what is read in one go; none: the default.")] = NONE,
    read_limit: Annotated[str, typer.Option(help="Hold all reads to rates, such as 400MB/s.")] = NONE,
    runs: Annotated[int, typer.Option(min=1, help="Runs of each, in turn.")] = 5,
    passes: Annotated[int, typer.Option(min=1, help="Passes measured per run.")] = 5,
    png: Annotated[Path | None, typer.Option(help="Draw the rates.")] = None,
    out: Annotated[Path | None, typer.Option(help="Append the JSON lines here instead of printing them.")] = None,
) -> None:
    """Bare reads of the streamed bytes against plain streaming, in turn; a JSON line for each combination."""
    chosen = combinations(
        target=target,
        memory=memory,
        read_threads=threads,
        chunk_bytes=chunk,
        extent_bytes=extent,
        read_limit=read_limit,
    )
    for settings in chosen:
        settings["read_threads"] = settings["read_threads"] and number(settings["read_threads"], "--threads")
        for name in ("chunk_bytes", "extent_bytes"):
            settings[name] = settings[name] and parse_size(settings[name], 0)
    measured = []
    for settings in chosen:
        found, line = bench(settings, runs, passes)
        measured.append(found)
        emit(line, out)
    if png is not None:
        draw(labels(chosen), measured, png)


if __name__ == "__main__":
    typer.run(main)
