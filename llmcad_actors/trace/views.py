"""A trace, looked at: a summary, one pass's token tree, a timeline for Perfetto, a picture."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text
from rich.tree import Tree
from tokenizers import Tokenizer

from llmcad_actors.core.quoting import quoted, shown
from llmcad_actors.core.sizes import format_size
from llmcad_actors.core.tree import ROOT, TokenTree
from llmcad_actors.errors import LlmcadError, UserError
from llmcad_actors.storage.small_file import reason
from llmcad_actors.text.tokenizer import read_tokenizer
from llmcad_actors.trace.file import Trace, TraceEvent

LANES = ("coordinator", "draft", "verifier", "loader")
DEEPEST_DRAWN, MOST_DRAWN = 256, 10_000  # levels and nodes of a tree; no line is wide enough for more
MOST_ROWS = 64
"""Of a lane: a run has as many as reading threads; finding room in more of them takes long."""

Show = Callable[[int], str]
"""The text of a token id."""


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass of the target, as the coordinator saw it."""

    tree: TokenTree
    path: tuple[int, ...]  # accepted nodes
    bonus: int
    root: int  # the token that the tree continues
    start: float
    end: float

    @property
    def num_tokens(self) -> int:
        return len(self.path) + 1

    @property
    def seconds(self) -> float:
        return self.end - self.start


def passes_of(trace: Trace) -> list[Pass]:
    """All passes, in order; one that never came back is left out. Raises `UserError` for a path that no tree has."""
    root, passes = trace.header.prompt[-1], list[Pass]()
    submissions, verdicts = (trace.named("coordinator", name) for name in ("submission", "verdict"))
    for submission, verdict in zip(submissions, verdicts, strict=False):
        data = verdict.data
        if any(node >= len(submission.data["tree"]) for node in data["path"]):
            raise UserError(f"pass {len(passes) + 1} accepts nodes that its tree does not have; record the trace again")
        passes.append(Pass(submission.data["tree"], data["path"], data["bonus"], root, submission.start, verdict.end))
        root = data["bonus"]
    return passes


# ---------------------------------------------------------------------------------------------------- summary


def summary(trace: Trace) -> dict[str, Any]:
    """Figures of the whole request, by name."""
    passes, steps = passes_of(trace), trace.named("draft", "step")
    tokens = min(sum(each.num_tokens for each in passes), trace.header.max_new_tokens)
    reads = trace.named("loader", "read")
    return {
        "target": trace.header.target,
        "draft": trace.header.draft,
        "passes": len(passes),
        "undrafted_passes": max(0, len(passes) - len(trace.named("coordinator", "grow"))),
        "tokens": tokens,
        "tokens_per_pass": tokens / len(passes) if passes else 0.0,
        "seconds": passes[-1].end - passes[0].start if passes else 0.0,
        "draft_steps": len(steps),
        "provisional_steps": sum(bool(step.data["provisional"]) for step in steps),
        "head_starts": sum(bool(event.data["head_start"]) for event in trace.named("draft", "reroot")),
        "bytes_read": sum(int(event.data["bytes"]) for event in reads),
        "stall_seconds": sum(event.seconds for event in trace.named("verifier", "stall")),
        "compute_seconds": sum(event.seconds for event in trace.named("verifier", "compute")),
        "steady_disk_idle_share": disk_idle_share(trace),
        "dropped_events": trace.num_dropped,
        "missing": list(trace.missing),
    }


def disk_idle_share(trace: Trace) -> float | None:
    """Share of the time from the first pass's end to the last one's in which no read was in flight.

    None where there is no such time, or nothing was read at all.
    """
    passes, reads = passes_of(trace), trace.named("loader", "read")
    if len(passes) < 2 or not reads:
        return None
    start, end = passes[0].end, passes[-1].end
    if start == end:
        return None
    return 1.0 - covered_seconds(((read.start, read.end) for read in reads), start, end) / (end - start)


def covered_seconds(spans: Iterable[tuple[float, float]], start: float, end: float) -> float:
    """Seconds between `start` and `end` that lie in at least one span."""
    covered, reached = 0.0, start
    for begin, until in sorted(spans):
        begin, until = max(begin, reached), min(until, end)
        if until > begin:
            covered, reached = covered + until - begin, until
    return covered


def summary_table(trace: Trace) -> Table:
    facts = summary(trace)
    idle = facts["steady_disk_idle_share"]
    title = Text(shown(f"{Path(facts['target']).name}, {trace.header.date}"))  # not markup, whatever is in it
    table = Table(title=title, show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    table.add_row("target", Text(shown(facts["target"])))
    table.add_row("draft", Text(shown(facts["draft"] or "none")))
    table.add_section()
    table.add_row("passes", f"{facts['passes']}, {facts['undrafted_passes']} of them without drafting")
    table.add_row("tokens", f"{facts['tokens']}, {facts['tokens_per_pass']:.1f} a pass")
    table.add_row("seconds", f"{facts['seconds']:.2f}")
    table.add_row("draft steps", f"{facts['draft_steps']}, {facts['provisional_steps']} of them during passes")
    table.add_row("head starts", str(facts["head_starts"]))
    table.add_row("layers computed", f"{facts['compute_seconds']:.2f} s")
    table.add_row("stalls", f"{facts['stall_seconds']:.2f} s")
    table.add_row("read from disk", format_size(facts["bytes_read"]))
    table.add_row("disk idle, after the first pass", "nothing was read" if idle is None else f"{idle:.1%}")
    if facts["dropped_events"]:
        table.add_row("events lost", f"{facts['dropped_events']} (an actor's memory was full)")
    if facts["missing"]:
        table.add_row("no answer in the end", Text(shown(", ".join(facts["missing"]))))
    return table


# ------------------------------------------------------------------------------------------------------- tree


def token_tree(trace: Trace, number: int) -> Tree:
    """The tree of pass `number`, counted from 1; accepted nodes stand out. Raises `UserError` for another number."""
    passes = passes_of(trace)
    if not 1 <= number <= len(passes):
        raise UserError(f"--tree {number}: the trace has {len(passes)} passes; give a number from 1 to {len(passes)}")
    seen, show = passes[number - 1], token_texts(trace.header.target)
    depth = int(seen.tree.depths.max(initial=0))
    if depth > DEEPEST_DRAWN or len(seen.tree) > MOST_DRAWN:
        raise UserError(
            f"--tree {number}: its {len(seen.tree):,} nodes on {depth:,} levels are too many to print "
            f"({MOST_DRAWN:,} on {DEEPEST_DRAWN} at most); `--out FILE` writes the trace for a viewer"
        )
    counts = f"{len(seen.tree)} nodes, {len(seen.path)} accepted, {seen.num_tokens} tokens, {seen.seconds:.2f} s"
    tree = Tree(Text.assemble(f"pass {number}: {counts}\n", (show(seen.root), "bold")))
    accepted, branches = set(seen.path), {ROOT: tree}
    for node in _likeliest_first(seen.tree):
        label = _node_label(seen.tree, node, show, accepted=node in accepted)
        branches[node] = branches[int(seen.tree.parents[node])].add(label, guide_style="dim")
    end = seen.path[-1] if seen.path else ROOT
    branches[end].add(Text.assemble((show(seen.bonus), "bold magenta"), ("  the target's own", "magenta")))
    return tree


def token_texts(target: str) -> Show:
    """Tokens as the target's tokenizer writes them; as numbers where there is no tokenizer any more."""
    try:
        tokenizer: Tokenizer = read_tokenizer(Path(target))
    except LlmcadError:
        return str
    return lambda token: quoted(tokenizer.decode([token], skip_special_tokens=False))


def _likeliest_first(tree: TokenTree) -> list[int]:
    """Parents before children, a likelier child before its siblings."""
    order: list[int] = np.lexsort((-tree.cumulative, tree.depths)).tolist()
    return order


def _node_label(tree: TokenTree, node: int, show: Show, *, accepted: bool) -> Text:
    own, whole = math.exp(tree.logprobs[node]), math.exp(tree.cumulative[node])
    return Text.assemble(
        (show(int(tree.tokens[node])), "bold green" if accepted else ""),
        (f"  {own:.0%}", "green" if accepted else "dim"),
        (f" ({whole:.2%} from the root)" if tree.depths[node] > 1 else "", "dim"),
        ("  accepted" if accepted else "", "green"),
    )


# ------------------------------------------------------------------------------------------- Chrome, Perfetto


def chrome_events(trace: Trace) -> Iterator[dict[str, Any]]:
    """Trace events as Chrome and Perfetto read them: microseconds since the start, one process for all lanes."""
    zero, tid = trace.header.started, 0
    for lane in LANES:
        for row, events in enumerate(rows_of([event for event in trace.events if event.lane == lane])):
            tid += 1
            name = lane if row == 0 else f"{lane} {row + 1}"
            yield {"ph": "M", "name": "thread_name", "pid": 1, "tid": tid, "args": {"name": name}}
            yield {"ph": "M", "name": "thread_sort_index", "pid": 1, "tid": tid, "args": {"sort_index": tid}}
            for event in events:
                yield _chrome_event(event, zero, tid)
    tokens = 0
    for each in passes_of(trace):
        tokens += each.num_tokens
        yield {"ph": "C", "name": "tokens", "pid": 1, "ts": (each.end - zero) * 1e6, "args": {"tokens": tokens}}


def write_chrome(trace: Trace, path: Path) -> None:
    """Raises `UserError` when the file cannot be written."""
    header = trace.header
    other = {"target": header.target, "draft": header.draft, "date": header.date, "settings": header.settings}
    document = {"traceEvents": list(chrome_events(trace)), "displayTimeUnit": "ms", "otherData": other}
    try:
        path.write_text(json.dumps(document, default=_plain))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {shown(path)}: {reason(error)}") from None


def rows_of(events: Sequence[TraceEvent]) -> list[list[TraceEvent]]:
    """Rows in which no two events overlap, unless one lies inside the other; `MOST_ROWS` at most, whatever is left in
    the last. `events` are sorted by start.
    """
    rows: list[list[TraceEvent]] = []
    open_until: list[list[float]] = []  # per row, the ends of events not over yet, outermost first
    for event in events:
        for row, ends in zip(rows, open_until, strict=True):
            while ends and ends[-1] <= event.start:
                ends.pop()
            if not ends or event.end <= ends[-1]:
                row.append(event)
                ends.append(event.end)
                break
        else:
            if len(rows) == MOST_ROWS:
                rows[-1].append(event)
                continue
            rows.append([event])
            open_until.append([event.end])
    return rows


def _chrome_event(event: TraceEvent, zero: float, tid: int) -> dict[str, Any]:
    name = f"{event.name} {event.data['shard']}" if "shard" in event.data else event.name
    common = {"name": name, "cat": event.name, "pid": 1, "tid": tid, "ts": (event.start - zero) * 1e6}
    if event.end == event.start:
        return {**common, "ph": "i", "s": "t", "args": event.data}
    return {**common, "ph": "X", "dur": event.seconds * 1e6, "args": event.data}


def _plain(value: Any) -> Any:
    if isinstance(value, TokenTree):
        return {name: getattr(value, name).tolist() for name in ("tokens", "parents", "logprobs")}
    raise TypeError(f"{type(value).__name__} has no place in JSON")
