"""How many tokens does a pass yield, by draft, tree size and policy?

    python -m benchmarks.tokens_per_pass [--prompts 16] [--tokens 96] [--nodes 128] [--temperature 0.8]
    python -m benchmarks.tokens_per_pass --real [--draft 4bit|3bit|random] [--questions FILE]

The figure does not depend on the disk: the bundled target, which fits, gives it in a minute, and the demo's target
computes the same function. So it is with the published model and its enlarged copy.
"""

from typing import Annotated

import typer
from rich.progress import track

from benchmarks import workload
from benchmarks.common import BUNDLED, Spread, emit, measurement, screen
from llmcad_actors.cli.commands import reports_errors
from llmcad_actors.engine import Engine


@reports_errors
def main(
    target: Annotated[str, typer.Option(help="`bundled`, `demo`, or a model directory.")] = BUNDLED,
    draft: workload.Draft = None,
    prompts: Annotated[int, typer.Option(min=1, help="How many texts.")] = 16,
    tokens: Annotated[int, typer.Option(min=1, help="New tokens per text.")] = 96,
    nodes: Annotated[int, typer.Option(help="Tree nodes at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0: greedy; else text i is drawn with seed i.")] = 0.0,
    fallback: Annotated[str, typer.Option(help="Fallback policy.")] = "full-tree",
    memory: Annotated[str, typer.Option(help="Memory cap.")] = "2GB",
    sharpen: Annotated[bool, typer.Option(help="Learn how much surer the target is than the draft.")] = True,
    real: workload.Real = False,
    large: workload.Large = False,
    questions: workload.Questions = None,
) -> None:
    """Print one JSON line: tokens per pass over all prompts together, and its spread over prompts."""
    work = workload.chosen(target, draft, prompts, real=real, large=large, questions=questions)
    settings = {
        "memory": memory,
        "max_nodes": nodes,
        "fallback": fallback,
        "provisional": False,
        "sharpen": sharpen,
    }
    with Engine.launch(work.target, work.draft, **settings) as engine:  # type: ignore[arg-type]
        stats = [
            engine.generate(text, max_new_tokens=tokens, chat=work.is_chat, temperature=temperature, seed=i).stats
            for i, text in enumerate(track(work.texts, "texts", console=screen))
        ]
    total = sum(s.new_tokens for s in stats) / sum(s.target_passes for s in stats)
    values = {
        "tokens_per_pass": round(total, 3),
        "by_prompt": Spread.of([s.tokens_per_pass for s in stats]),
        "draft_steps_per_pass": sum(s.draft_steps for s in stats) / sum(s.target_passes for s in stats),
        "verified_nodes_per_pass": sum(s.verified_nodes for s in stats) / sum(s.target_passes for s in stats),
    }
    config = {**work.config(), "tokens": tokens, "temperature": temperature, **settings}
    emit(measurement("tokens_per_pass", values, config=config, cache_state="resident", seed=0))


if __name__ == "__main__":
    typer.run(main)
