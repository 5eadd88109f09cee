"""The tables that `llmcad plan` and `llmcad demo` print."""

from collections.abc import Callable

from rich.table import Table
from rich.text import Text

from llmcad_actors.cli.comparison import Comparison
from llmcad_actors.core.budget import format_size
from llmcad_actors.core.quoting import shown
from llmcad_actors.core.stats import Stats
from llmcad_actors.plan.job import Prepared
from llmcad_actors.plan.prediction import draft_pays, figures_of, predicted_pass, sharing

DEMO_ROWS: tuple[tuple[str, Callable[[Stats], str]], ...] = (
    ("seconds per token", lambda s: f"{s.seconds / s.new_tokens:.2f}"),
    ("tokens per pass", lambda s: f"{s.tokens_per_pass:.1f}"),
    ("tokens", lambda s: str(s.new_tokens)),
    ("read from disk", lambda s: format_size(s.bytes_read)),
    ("peak memory", lambda s: format_size(s.peak_memory_bytes)),
)


def demo_table(compared: Comparison, job: Prepared) -> Table:
    """The figures of both runs that the demo ends with."""
    cap = format_size(job.memory.cap_bytes)
    table = Table(title=f"{format_size(job.target.total_bytes)} of weights, memory cap {cap}")
    for column in ("", "speculation", "plain"):
        table.add_column(column, justify="right" if column else "left")
    for name, of in DEMO_ROWS:
        table.add_row(name, of(compared.fast.stats), of(compared.plain.stats))
    return table


def plan_table(job: Prepared) -> Table:
    """How the cap is split, what is streamed, and how long a pass will take."""
    memory = job.memory
    title = Text(f"{shown(job.target_name)}: {format_size(job.target.total_bytes)} of weights")  # not markup
    table = Table(title=title, show_header=False)
    for name, size in memory.rows():
        table.add_row(name, format_size(size))
    table.add_section()
    table.add_row("in all", format_size(memory.total_bytes))
    table.add_row("memory cap", format_size(memory.cap_bytes))
    table.add_section()
    table.add_row("pinned", f"{len(memory.pinned)} of {len(memory.pinned) + len(memory.streamed)} shards")
    table.add_row("read from disk in a pass", format_size(memory.bytes_per_pass))
    shared = sharing(job)
    table.add_section()
    table.add_row("requests at once", f"{shared['max_requests']}, of {shared['text_tokens']} tokens together")
    table.add_row("a token of a request takes", format_size(shared["bytes_per_token"]))
    table.add_row("tree nodes in a pass at most", str(shared["max_nodes"]))
    predicted = predicted_pass(job)
    table.add_section()
    measured = figures_of(job)
    table.add_row("predicted from", f"llmcad doctor {measured}" if measured else "a usual machine; run llmcad doctor")
    table.add_row("rows in a pass", str(predicted.rows))
    table.add_row("seconds per pass", f"{predicted.seconds:.2f}")
    if predicted.rows > 1:
        table.add_row("tokens per pass, assumed", f"{predicted.tokens:.1f}")
    table.add_row("tokens per second", f"{predicted.tokens_per_second:.2f}")
    if job.draft is not None:
        table.add_section()
        alone = predicted_pass(job.without_draft())
        table.add_row("seconds per token with the draft", f"{predicted.seconds_per_token:.3g}")
        table.add_row("without, its memory for the target", f"{alone.seconds_per_token:.3g}")
        table.add_row("faster", "with the draft" if draft_pays(job) else "without the draft: --draft none")
    return table
