"""How many tokens does a pass yield? The bundled pair over the prompts, for several tree sizes and policies.

    python -m benchmarks.tokens_per_pass [--prompts 16] [--tokens 96] [--nodes 128] [--fallback full-tree]

The figure does not depend on the disk: the bundled target, which fits, gives it in a minute, and the demo's target
computes the same function (in bfloat16 up to rounding).
"""

from typing import Annotated

import typer

from benchmarks.common import BUNDLED, Spread, emit, measurement, model_paths, read_prompts
from llmcad_actors.cli import reports_errors
from llmcad_actors.engine import Engine


@reports_errors
def main(
    target: Annotated[str, typer.Option(help="`bundled`, `demo`, or a model directory.")] = BUNDLED,
    draft: Annotated[str | None, typer.Option(help="Draft directory; default: the bundled one.")] = None,
    prompts: Annotated[int, typer.Option(help="How many of the prompts.")] = 16,
    tokens: Annotated[int, typer.Option(help="New tokens per prompt.")] = 96,
    nodes: Annotated[int, typer.Option(help="Tree nodes at most.")] = 128,
    fallback: Annotated[str, typer.Option(help="Fallback policy.")] = "full-tree",
    memory: Annotated[str, typer.Option(help="Memory cap.")] = "2GB",
    sharpen: Annotated[bool, typer.Option(help="Learn how much surer the target is than the draft.")] = True,
) -> None:
    """Print one JSON line: tokens per pass over all prompts together, and its spread over prompts."""
    path, draft_path = model_paths(target, draft)
    settings = {
        "memory": memory,
        "max_nodes": nodes,
        "fallback": fallback,
        "provisional": False,
        "sharpen": sharpen,
    }
    with Engine.launch(path, draft_path, **settings) as engine:  # type: ignore[arg-type]
        stats = [engine.generate(text, max_new_tokens=tokens).stats for text in read_prompts(prompts)]
    total = sum(s.new_tokens for s in stats) / sum(s.target_passes for s in stats)
    values = {
        "tokens_per_pass": round(total, 3),
        "by_prompt": Spread.of([s.tokens_per_pass for s in stats]),
        "draft_steps_per_pass": sum(s.draft_steps for s in stats) / sum(s.target_passes for s in stats),
        "verified_nodes_per_pass": sum(s.verified_nodes for s in stats) / sum(s.target_passes for s in stats),
    }
    config = {"target": target, "prompts": prompts, "tokens": tokens, **settings}
    emit(measurement("tokens_per_pass", values, config=config, cache_state="resident"))


if __name__ == "__main__":
    typer.run(main)
