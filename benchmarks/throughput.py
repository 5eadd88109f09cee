"""What do requests gain from sharing passes? Tokens per second, and how long users wait, by how many ask at once.

    python -m benchmarks.throughput [--concurrency 1,2,4,8,16] [--rates 0.1,0.2] [--read-limit 400MB/s] [--png FILE]
    python -m benchmarks.throughput --large --memory 1.6GB [--temperature 0.8]

Closed loop: so many users, each of whom asks again as soon as the last answer is whole; 1 is one after another. Open
loop: requests arrive at random (Poisson) at a rate a second. One engine serves all; each text is asked for once a run.
"""

import asyncio
import itertools
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table

from benchmarks import workload
from benchmarks.common import emit, measurement, screen
from llmcad_actors.cli.commands import reports_errors
from llmcad_actors.engine import Engine
from llmcad_actors.tools.bundled import DEMO

SEED = 1


@dataclass(frozen=True, slots=True)
class Served:
    """One request, as its user saw it."""

    asked: float  # seconds on the clock
    arrivals: tuple[float, ...]  # of pieces
    tokens: int
    passes: int

    @property
    def first_s(self) -> float:
        return self.arrivals[0] - self.asked

    @property
    def between_s(self) -> float:
        """Mean time between tokens, after the first piece."""
        return (self.arrivals[-1] - self.arrivals[0]) / max(1, self.tokens - 1)


async def ask(engine: Engine, text: str, number: int, options: dict[str, Any]) -> Served:
    asked, arrivals = time.monotonic(), list[float]()
    generation = await engine.asubmit(text, **options, seed=number)
    async for _ in generation:
        arrivals.append(time.monotonic())
    stats = generation.stats
    return Served(asked, tuple(arrivals), stats.new_tokens, stats.target_passes)


async def closed_loop(engine: Engine, texts: Sequence[str], users: int, options: dict[str, Any]) -> list[Served]:
    waiting, served = iter(enumerate(texts)), list[Served]()

    async def user() -> None:
        for number, text in waiting:
            served.append(await ask(engine, text, number, options))
            screen.print(f"{users} at once: {len(served)} of {len(texts)}", style="dim")

    await asyncio.gather(*(user() for _ in range(users)))
    return served


async def open_loop(engine: Engine, texts: Sequence[str], rate: float, options: dict[str, Any]) -> list[Served]:
    async def arrivals() -> AsyncIterator[tuple[int, str]]:
        rng = np.random.default_rng(SEED)
        for number, text in enumerate(texts):
            yield number, text
            await asyncio.sleep(rng.exponential(1 / rate))

    tasks = [asyncio.create_task(ask(engine, text, number, options)) async for number, text in arrivals()]
    return list(await asyncio.gather(*tasks))


def values_of(served: Sequence[Served]) -> dict[str, Any]:
    began, ended = min(each.asked for each in served), max(each.arrivals[-1] for each in served)
    tokens = sum(each.tokens for each in served)
    firsts, betweens = ([getattr(each, name) for each in served] for name in ("first_s", "between_s"))
    return {
        "tokens_per_s": tokens / (ended - began),
        "seconds": ended - began,
        "tokens": tokens,
        "tokens_per_pass_of_a_request": tokens / sum(each.passes for each in served),
        "first_token_s": statistics.median(firsts),
        "first_token_p95_s": float(np.percentile(firsts, 95)),
        "between_tokens_s": statistics.median(betweens),
        "between_tokens_p95_s": float(np.percentile(betweens, 95)),
    }


def numbers(text: str, kind: type) -> list[Any]:
    return [kind(part) for part in text.split(",") if part.strip()]


@reports_errors
def main(
    target: Annotated[str, typer.Option(help="`demo`, `bundled`, or a model directory.")] = DEMO,
    draft: workload.Draft = None,
    concurrency: Annotated[str, typer.Option(help="Users at once, closed loop.")] = "1,2,4,8,16",
    rates: Annotated[str, typer.Option(help="Requests a second, open loop; none by default.")] = "",
    prompts: Annotated[int, typer.Option(min=1, help="How many texts a run.")] = 16,
    tokens: Annotated[int, typer.Option(min=1, help="New tokens per text.")] = 96,
    characters: Annotated[
        int, typer.Option(min=1, help="Of each stretch of source, its last ones; questions are asked as they are.")
    ] = 200,
    temperature: Annotated[float, typer.Option(help="0: greedy.")] = 0.0,
    memory: Annotated[str, typer.Option(help="Memory cap.")] = "1.5GB",
    read_limit: Annotated[str | None, typer.Option(help="Hold the disk reads to a rate.")] = None,
    max_requests: Annotated[int | None, typer.Option(help="That share passes; others wait.")] = None,
    max_nodes: Annotated[int | None, typer.Option(help="Tree nodes of a pass at most.")] = None,
    runs: Annotated[int, typer.Option(min=1, help="Each setting so often, in turns.")] = 1,
    png: Annotated[Path | None, typer.Option(help="Draw tokens per second and waits.")] = None,
    real: workload.Real = False,
    large: workload.Large = False,
    questions: workload.Questions = None,
) -> None:
    """Print one JSON line for each setting and run."""
    work = workload.chosen(target, draft, prompts, real=real, large=large, questions=questions)
    texts = work.texts if work.is_chat else [text[-characters:] for text in work.texts]
    users = numbers(concurrency, int)
    settings: dict[str, Any] = {"memory": memory, "read_limit": read_limit}
    given = {"max_nodes": max_nodes, "max_requests": max_requests}
    settings |= {name: value for name, value in given.items() if value is not None}
    options: dict[str, Any] = {"max_new_tokens": tokens, "chat": work.is_chat}
    options |= {"temperature": temperature} if temperature else {}
    lines = []
    with Engine.launch(work.target, work.draft, **settings) as engine:
        engine.generate(texts[-1], max_new_tokens=8, chat=work.is_chat)  # touches what has to be touched
        for _, (kind, value) in itertools.product(
            range(runs), [*(("users", n) for n in users), *(("rate", r) for r in numbers(rates, float))]
        ):
            loop = closed_loop if kind == "users" else open_loop
            values = values_of(asyncio.run(loop(engine, texts, value, options)))
            config = {
                **work.config(),
                "tokens": tokens,
                "characters": characters,
                "temperature": temperature,
                kind: value,
                **settings,
            }
            lines.append(measurement("throughput", values, config=config, cache_state="streamed", seed=SEED))
            emit(lines[-1])
    screen.print(table_of(lines))
    if png is not None:
        draw(lines, png)


def table_of(lines: Sequence[dict[str, Any]]) -> Table:
    table = Table("requests", "tokens/s", "against one", "first token s (p95)", "between tokens s (p95)")
    alone = [line["tokens_per_s"] for line in lines if line["config"].get("users") == 1]
    for key, group in _grouped(lines):
        rate = statistics.median(line["tokens_per_s"] for line in group)
        table.add_row(
            key,
            f"{rate:.2f}",
            f"{rate / statistics.median(alone):.2f}x" if alone else "",
            *(
                f"{statistics.median(line[f'{name}_s'] for line in group):.2f} "
                f"({statistics.median(line[f'{name}_p95_s'] for line in group):.2f})"
                for name in ("first_token", "between_tokens")
            ),
        )
    return table


def _grouped(lines: Sequence[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        config = line["config"]
        key = f"{config['users']} at once" if "users" in config else f"{config['rate']:g} a second"
        groups.setdefault(key, []).append(line)
    return list(groups.items())


def draw(lines: Sequence[dict[str, Any]], png: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = _grouped(lines)
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    names = [key for key, _ in groups]
    for axis, (title, field) in zip(
        axes,
        (("tokens per second, all together", "tokens_per_s"), ("seconds to the first token", "first_token_s")),
        strict=True,
    ):
        axis.bar(names, [statistics.median(line[field] for line in group) for _, group in groups])
        axis.set_title(title)
        axis.tick_params(axis="x", rotation=30)
    figure.savefig(png, dpi=150)


if __name__ == "__main__":
    typer.run(main)
