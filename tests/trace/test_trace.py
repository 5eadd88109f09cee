"""Tracing: recorders, the file, what is made of it; and one real run."""

import io
import itertools
import json
import math
import os
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from llmcad_actors.cli.commands import app
from llmcad_actors.config import EngineConfig
from llmcad_actors.core.budget import smallest_cap
from llmcad_actors.core.trace import Recorder, Span, TraceBatch
from llmcad_actors.core.tree import TokenTree
from llmcad_actors.engine import Engine
from llmcad_actors.errors import UserError
from llmcad_actors.messages import pack, unpack, unpack_stream
from llmcad_actors.plan.footprint import budget_inputs
from llmcad_actors.plan.prepare import prepare
from llmcad_actors.results import Result
from llmcad_actors.tools.bundled import bundled_draft, bundled_target
from llmcad_actors.trace.file import (
    Trace,
    TraceEvent,
    TraceHeader,
    TraceWriter,
    check_writable,
    read_trace,
)
from llmcad_actors.trace.picture import draw
from llmcad_actors.trace.views import (
    covered_seconds,
    disk_idle_share,
    passes_of,
    rows_of,
    summary,
    summary_table,
    token_tree,
    write_chrome,
)

HEADER = TraceHeader(
    target="/models/none",
    draft=None,
    settings={"memory": "1GB", "widths": (1, 3)},
    prompt=(3, 7),
    max_new_tokens=100,
    started=10.0,
    date="2025-01-01T00:00:00+00:00",
    llmcad="0",
)
TREE = TokenTree.build([11, 12, 13], [-1, 0, -1], [-0.1, -0.5, -2.5])
EMPTY = TokenTree.empty()

spans = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)).map(sorted), max_size=12)


def ticking() -> Recorder:
    """A recorder whose clock advances a second at each look."""
    return Recorder("draft", itertools.count().__next__, capacity=3)


def coordinator(tree: TokenTree, path: tuple[int, ...], bonus: int, start: float, end: float) -> list[Span]:
    return [
        ("submission", start, start, {"tree": tree}),
        ("verify", start, end, {"nodes": len(tree)}),
        ("verdict", end, end, {"path": path, "bonus": bonus, "stopped": False}),
    ]


def read(start: float, end: float) -> Span:
    return ("read", start, end, {"shard": "layer.0", "bytes": 100})


BATCHES = (
    TraceBatch("loader", (read(10.0, 11.5), read(11.0, 13.0), read(14.0, 15.0)), 0),
    TraceBatch("coordinator", tuple(coordinator(TREE, (0, 1), 21, 10.5, 12.0)), 0),
    TraceBatch(
        "verifier", (("stall", 10.5, 11.0, {"shard": "layer.0"}), ("compute", 11.0, 11.9, {"shard": "layer.0"})), 2
    ),
    TraceBatch("draft", (("step", 10.0, 10.1, {"nodes": 1, "provisional": False}),), 0),
    TraceBatch("draft", (("step", 10.6, 10.9, {"nodes": 8, "provisional": True}),), 0),
    TraceBatch("draft", (("reroot", 12.0, 12.1, {"head_start": True, "nodes": 4}),), 0),
    TraceBatch("coordinator", tuple(coordinator(EMPTY, (), 22, 12.0, 16.0)), 0),
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A small whole trace: two passes, the second without a tree."""
    path = tmp_path / "run.trace"
    writer = TraceWriter(path, HEADER)
    for batch in BATCHES:
        writer.write(pack(batch))
    writer.close(missing=("loader",))
    return path


@pytest.fixture
def trace(file: Path) -> Trace:
    return read_trace(file)


def printed(what: object) -> str:
    out = io.StringIO()
    Console(file=out, width=100).print(what)
    return out.getvalue()


# The recorder


def test_a_recorder_that_is_off_keeps_nothing() -> None:
    recorder = ticking()
    recorder.add("step", 0.0, nodes=3)
    recorder.mark("verdict")
    assert recorder.drain(goes_on=False) == TraceBatch("draft", (), 0)


def test_what_is_drained_is_what_was_recorded_since_the_last_drain() -> None:
    recorder = ticking()
    recorder.drain(goes_on=True)
    recorder.add("step", 0.0, 0.5, nodes=3)
    recorder.mark("verdict", bonus=1)
    assert recorder.drain(goes_on=True).spans == (("step", 0.0, 0.5, {"nodes": 3}), ("verdict", 0, 0, {"bonus": 1}))
    recorder.add("step", 1.0)
    assert recorder.drain(goes_on=False).spans == (("step", 1.0, 1, {}),)
    recorder.add("step", 2.0)
    assert recorder.drain(goes_on=False).spans == ()


def test_a_recorder_is_bounded_and_says_what_it_lost() -> None:
    recorder = ticking()
    recorder.drain(goes_on=True)
    for _ in range(5):
        recorder.mark("step")
    batch = recorder.drain(goes_on=True)
    assert (len(batch.spans), batch.num_dropped) == (3, 2)
    assert recorder.drain(goes_on=True).num_dropped == 0


# The file


def test_a_trace_comes_back_whole_and_sorted(trace: Trace) -> None:
    assert trace.header == HEADER
    assert (trace.num_dropped, trace.missing) == (2, ("loader",))
    assert len(trace.events) == sum(len(batch.spans) for batch in BATCHES)
    assert [event.start for event in trace.events] == sorted(event.start for event in trace.events)
    assert trace.named("coordinator", "submission")[0].data["tree"] == TREE


def test_every_trace_that_is_cut_short_is_refused(file: Path, tmp_path: Path) -> None:
    data, cut = file.read_bytes(), tmp_path / "cut.trace"
    for size in range(len(data)):
        cut.write_bytes(data[:size])
        with pytest.raises(UserError, match="is not a"):
            read_trace(cut)


@pytest.mark.parametrize(
    "content",
    [b"", b'{"traceEvents": []}', b"\xc1\xc1", msgpack.packb({"format": "other"}), msgpack.packb([1, 2]), b"\x89PNG"],
)
def test_a_foreign_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "foreign"
    path.write_bytes(content)
    with pytest.raises(UserError, match="is not a trace; `llmcad generate --trace FILE` writes one"):
        read_trace(path)


def test_other_bad_traces_are_named(file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read the trace"):
        read_trace(tmp_path / "absent")
    with pytest.raises(UserError, match="cannot read the trace"):
        read_trace(tmp_path)
    header = next(unpack_stream(io.BytesIO(file.read_bytes())))
    (tmp_path / "newer").write_bytes(pack({**header, "version": 99}))
    with pytest.raises(UserError, match="version 99, this llmcad reads 1"):
        read_trace(tmp_path / "newer")
    (tmp_path / "garbled").write_bytes(file.read_bytes()[:-30] + bytes([0xC1]) * 30)
    with pytest.raises(UserError, match="nothing readable at byte"):
        read_trace(tmp_path / "garbled")


def forged(path: Path, *batches: object, **header: object) -> Path:
    """A trace in which this stands, otherwise whole."""
    fields = {name: getattr(HEADER, name) for name in TraceHeader.__slots__}
    first = {"format": "llmcad trace", "version": 1, **fields, **header}
    values = (first, *batches, {"end of trace": True, "missing": ()})
    path.write_bytes(b"".join(msgpack.packb(value, default=_forged) for value in values))
    return path


def _forged(value: object) -> Any:
    return msgpack.unpackb(pack(value), ext_hook=msgpack.ExtType)


WRONG_FIELDS: dict[str, tuple[Any, ...]] = {
    "prompt": ((), "x", (1.5,), (-1,), (2**40,), None),
    "started": (math.nan, math.inf, "x", 1e300, None),
    "settings": ([], {"a": b"x"}, {1: 2}, {"a": math.nan}),
    "target": (5,),
    "draft": (5,),
    "max_new_tokens": (-1,),
    "date": (None,),
    "version": ("a" * 5000,),
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG_FIELDS.items() for value in values]
)
def test_a_header_that_says_what_no_run_says_is_refused(name: str, value: object, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the trace's header says|is a trace of version") as caught:
        read_trace(forged(tmp_path / "x", *BATCHES, **{name: value}))
    assert len(str(caught.value)) < 600


def batch(lane: str, name: str, start: Any = 1.0, end: Any = 2.0, data: Any = None) -> TraceBatch:
    return TraceBatch(lane, ((name, start, end, {} if data is None else data),), 0)


def spans_of(*spans: Any) -> tuple[Any, ...]:
    return spans


WRONG_DATA: dict[tuple[str, str], tuple[Any, ...]] = {
    ("draft", "step"): ({}, {"provisional": "no"}, [], {1: 2}, {"provisional": None}),
    ("loader", "read"): ({"bytes": -1}, {"bytes": "x"}, {"bytes": 1.5}, {"bytes": None}),
    ("x", "y"): ({"a": b"x"}, {"a": math.inf}, {"a": {2: 3}}, {"a": [[[[[[[[[[[[]]]]]]]]]]]]}),
    ("coordinator", "verdict"): tuple({"path": path, "bonus": 1} for path in spans_of("ab", (1.5,), (-1,), None)),
    ("coordinator", "submission"): ({"tree": [1]},),
}
WRONG_TIMES = spans_of((2.0, 1.0), (math.nan, 1.0), ("a", "b"), (1.0, 1e300), (True, 2.0))
WRONG_SPANS = spans_of(5, "ab", ((1, 2),), (("a", 1.0, 2.0, {}, 3),))
WRONG_BATCHES: tuple[object, ...] = (
    *(batch(*kind, data=data) for kind, many in WRONG_DATA.items() for data in many),
    *(batch("x", "y", *times) for times in WRONG_TIMES),
    *(TraceBatch("x", wrong, 0) for wrong in WRONG_SPANS),
    TraceBatch("x", (), "many"),  # type: ignore[arg-type]
    TraceBatch(5, (), 0),  # type: ignore[arg-type]
    ("something", "else"),
    TREE,
)


@pytest.mark.parametrize("number", range(len(WRONG_BATCHES)))
def test_an_event_that_no_actor_records_is_refused(number: int, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a whole trace: it holds") as caught:
        read_trace(forged(tmp_path / "x", WRONG_BATCHES[number]))
    assert len(str(caught.value)) < 800


def test_an_accepted_node_is_one_of_the_tree(tmp_path: Path) -> None:
    trace = read_trace(
        forged(tmp_path / "x", TraceBatch("coordinator", tuple(coordinator(TREE, (3,), 1, 1.0, 2.0)), 0))
    )
    for view in (summary_table, passes_of, lambda trace: token_tree(trace, 1)):
        with pytest.raises(UserError, match="pass 1 accepts nodes that its tree does not have"):
            view(trace)


def test_what_stands_in_a_trace_is_neither_markup_nor_mathematics(tmp_path: Path) -> None:
    path = forged(tmp_path / "x", *BATCHES, target="/a/[/red]$\\frac{$", date="[bold]", draft="[/x]\n")
    trace = read_trace(path)
    assert "[/red]$\\frac{$" in printed(summary_table(trace))
    draw(trace, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 0


def test_views_of_what_no_run_makes_end_in_time(tmp_path: Path) -> None:
    """20,000 reads at once; a tree of 3,000 levels; two passes that end at one moment."""
    chain = TokenTree.build(range(3000), range(-1, 2999), [-0.1] * 3000)
    spans = tuple(("read", number * 1e-3, 1e3 + number, {"bytes": 1}) for number in range(20_000))
    moments = (*coordinator(chain, (), 1, 1.0, 2.0), *coordinator(EMPTY, (), 1, 2.0, 2.0))
    trace = read_trace(forged(tmp_path / "x", TraceBatch("loader", spans, 0), TraceBatch("coordinator", moments, 0)))
    assert len(rows_of([event for event in trace.events if event.lane == "loader"])) == 64
    write_chrome(trace, tmp_path / "x.json")
    assert summary(trace)["steady_disk_idle_share"] is None
    with pytest.raises(UserError, match=r"its 3,000 nodes on 3,000 levels are too many to print"):
        token_tree(trace, 1)


@pytest.mark.parametrize("name", ["a" * 5000, "a\0b", "file/x"])
def test_a_trace_whose_name_cannot_be_is_refused(name: str, file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for refused in (read_trace, check_writable, lambda path: write_chrome(read_trace(file), path)):
        with pytest.raises(UserError, match="cannot"):
            refused(tmp_path / name)


def test_a_pipe_is_no_trace(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x")
    with pytest.raises(UserError, match="is not a regular file"):
        read_trace(tmp_path / "x")


def test_a_trace_that_cannot_be_written_is_refused_before_the_run(tmp_path: Path) -> None:
    for path in (tmp_path / "absent" / "x.trace", tmp_path):
        with pytest.raises(UserError, match="cannot write the trace"):
            check_writable(path)
        with pytest.raises(UserError, match="cannot write the trace"):
            TraceWriter(path, HEADER)
    check_writable(tmp_path / "x.trace")
    check_writable(None)


def test_a_batch_crosses_processes() -> None:
    for batch in BATCHES:
        assert unpack(pack(batch)) == batch


# Passes and figures


def test_passes_continue_each_other(trace: Trace) -> None:
    first, second = passes_of(trace)
    assert (first.root, first.path, first.bonus, first.num_tokens) == (7, (0, 1), 21, 3)
    assert (second.root, second.path, second.bonus, second.num_tokens) == (21, (), 22, 1)


def test_the_summary_counts_everything_once(trace: Trace) -> None:
    facts = summary(trace)
    assert (facts["passes"], facts["tokens"], facts["tokens_per_pass"]) == (2, 4, 2.0)
    assert (facts["draft_steps"], facts["provisional_steps"], facts["head_starts"]) == (2, 1, 1)
    assert facts["undrafted_passes"] == 2  # nothing of the coordinator's was recorded but submissions and verdicts
    assert (facts["bytes_read"], facts["dropped_events"], facts["missing"]) == (300, 2, ["loader"])
    assert facts["stall_seconds"] == pytest.approx(0.5)
    assert facts["compute_seconds"] == pytest.approx(0.9)
    assert facts["steady_disk_idle_share"] == pytest.approx(0.5)  # from 12 to 16, reads until 13 and from 14 to 15
    assert "50.0%" in printed(summary_table(trace))


def test_there_is_no_idle_share_of_a_single_pass() -> None:
    events = tuple(TraceEvent("coordinator", *span) for span in coordinator(TREE, (), 1, 0.0, 1.0))
    alone = Trace(HEADER, (*events, TraceEvent("loader", *read(0.0, 1.0))), 0, ())
    assert disk_idle_share(alone) is None
    assert disk_idle_share(Trace(HEADER, (), 0, ())) is None
    assert "nothing was read" in printed(summary_table(Trace(HEADER, (), 0, ())))


@given(spans, st.integers(0, 40), st.integers(0, 40))
def test_covered_seconds_count_overlaps_once(pairs: list[list[int]], left: int, right: int) -> None:
    start, end = sorted((left, right))
    seconds = {second for begin, until in pairs for second in range(begin, until)} & set(range(start, end))
    assert covered_seconds(((float(a), float(b)) for a, b in pairs), start, end) == len(seconds)


# Views


def test_the_token_tree_shows_probabilities_and_what_was_accepted(trace: Trace) -> None:
    tree = token_tree(trace, 1)
    text = printed(tree)
    assert "pass 1: 3 nodes, 2 accepted, 3 tokens" in text
    assert "12  61% (54.88% from the root)  accepted" in text
    assert "13  8%" in text and "13  8%  accepted" not in text
    assert "21  the target's own" in text
    (first, runner_up), child = tree.children, tree.children[0].children[0]
    assert [str(t.label).split()[0] for t in (first, runner_up, child)] == ["11", "13", "12"]
    assert str(child.children[-1].label).startswith("21")


def test_a_pass_without_a_tree_shows_the_bonus_alone(trace: Trace) -> None:
    tree = token_tree(trace, 2)
    assert [str(child.label) for child in tree.children] == ["22  the target's own"]


@pytest.mark.parametrize("number", [-1, 0, 3])
def test_a_pass_that_is_not_there_is_refused(trace: Trace, number: int) -> None:
    with pytest.raises(UserError, match="2 passes; give a number from 1 to 2"):
        token_tree(trace, number)


def test_the_timeline_is_what_chrome_reads(trace: Trace, tmp_path: Path) -> None:
    write_chrome(trace, tmp_path / "x.json")
    events = json.loads((tmp_path / "x.json").read_text())["traceEvents"]
    assert Counter(event["ph"] for event in events if event["ph"] in "Xi") == {"X": 10, "i": 4}
    spans = [event for event in events if event["ph"] == "X"]
    assert all(event["ts"] >= 0 and event["dur"] > 0 for event in spans)
    stall = next(event for event in spans if event["cat"] == "stall")
    assert (stall["name"], stall["ts"], stall["dur"]) == ("stall layer.0", 0.5e6, 0.5e6)
    assert [event["args"]["tokens"] for event in events if event["ph"] == "C"] == [3, 4]
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert list(names.values()) == ["coordinator", "draft", "verifier", "loader", "loader 2"]
    assert {event["tid"] for event in spans} <= names.keys()
    with pytest.raises(UserError, match="cannot write"):
        write_chrome(trace, tmp_path / "absent" / "x.json")


@given(spans)
def test_no_two_events_of_a_row_cross(pairs: list[list[int]]) -> None:
    events = sorted(
        (TraceEvent("loader", "read", float(a), float(b), {}) for a, b in pairs), key=lambda e: (e.start, -e.end)
    )
    rows = rows_of(events)
    assert Counter(map(id, events)) == Counter(id(event) for row in rows for event in row)
    for row in rows:
        for one, other in itertools.combinations(row, 2):
            assert one.end <= other.start or other.end <= one.end


def test_a_picture_is_drawn(trace: Trace, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw(trace, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    draw(Trace(HEADER, (), 0, ()), tmp_path / "empty.png")
    for bad in (tmp_path / "absent" / "x.png", tmp_path / "x.sorry"):
        with pytest.raises(UserError, match="cannot write the picture"):
            draw(trace, bad)


def test_without_matplotlib_the_error_says_what_to_install(
    trace: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'llmcad-actors\[plot\]'"):
        draw(trace, tmp_path / "x.png")


# The command


def test_the_command_prints_a_summary_or_what_is_asked_for(file: Path, tmp_path: Path) -> None:
    command = CliRunner()
    assert "50.0%" in command.invoke(app, ["trace", str(file)]).stdout
    assert "pass 1: 3 nodes" in command.invoke(app, ["trace", str(file), "--tree", "1"]).stdout
    assert command.invoke(app, ["trace", str(file), "--out", str(tmp_path / "x.json")]).stdout == ""
    assert (tmp_path / "x.json").exists()


def test_the_command_reports_a_bad_trace_in_a_paragraph(file: Path, tmp_path: Path) -> None:
    (tmp_path / "foreign").write_text("hello")
    for words in ([str(tmp_path / "foreign")], [str(tmp_path / "absent")], [str(file), "--tree", "9"]):
        result = CliRunner().invoke(app, ["trace", *words])
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.startswith("llmcad: ") and "Traceback" not in result.stderr


def test_a_trace_that_cannot_be_written_ends_the_command_before_anything_starts(tmp_path: Path) -> None:
    for words in (["generate", "hello"], ["demo"]):
        result = CliRunner().invoke(app, [*words, "--trace", str(tmp_path / "absent" / "x.trace")])
        assert result.exit_code == 2 and "cannot write the trace" in result.stderr


# A real run


@dataclass(frozen=True)
class Run:
    """The bundled pair under a cap that makes it stream."""

    fast: Result
    untraced: Result
    plain: Result
    fast_trace: Trace
    plain_trace: Trace


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    settings = EngineConfig(target=str(bundled_target()), draft=str(bundled_draft()), memory="4GB", dtype="float32")
    job = prepare(settings)
    least = smallest_cap(budget_inputs(settings, job.target, job.layout, job.draft, job.context), overlaps=True)
    folder, prompt = tmp_path_factory.mktemp("trace"), "def read_lines(path):\n    "
    with Engine.launch(bundled_target(), bundled_draft(), memory=str(least), dtype="float32") as engine:
        fast = engine.generate(prompt, max_new_tokens=24, trace=folder / "fast")
        untraced = engine.generate(prompt, max_new_tokens=24)
        plain = engine.generate(prompt, max_new_tokens=4, speculate=False, trace=folder / "plain")
    return Run(fast, untraced, plain, read_trace(folder / "fast"), read_trace(folder / "plain"))


def test_a_trace_tells_the_whole_run(run: Run) -> None:
    trace, stats = run.fast_trace, run.fast.stats
    passes = passes_of(trace)
    emitted = [token for each in passes for token in (*each.tree.tokens[list(each.path)].tolist(), each.bonus)]
    assert tuple(emitted[:24]) == run.fast.token_ids
    assert len(passes) == stats.target_passes == len(trace.named("verifier", "pass"))
    assert sum(len(each.tree) for each in passes) == stats.verified_nodes
    assert len(trace.named("draft", "step")) >= stats.draft_steps > 0
    assert (trace.num_dropped, trace.missing) == (0, ())
    assert summary(trace)["bytes_read"] > 0 and len(trace.named("loader", "read")) > 0


def test_every_pass_takes_every_shard_in_turn(run: Run) -> None:
    shards = [spec.name for spec in prepare(EngineConfig(**run.fast_trace.header.settings)).layout.shards]
    for trace in (run.fast_trace, run.plain_trace):
        for name in ("stall", "compute"):
            taken = [event.data["shard"] for event in trace.named("verifier", name)]
            assert taken == shards * len(passes_of(trace))


def test_all_actors_share_one_clock(run: Run) -> None:
    trace = run.fast_trace
    waits, passes = trace.named("coordinator", "verify"), trace.named("verifier", "pass")
    assert all(wait.start <= each.start <= each.end <= wait.end for wait, each in zip(waits, passes, strict=True))
    grows = trace.named("coordinator", "grow")
    for step in trace.named("draft", "step"):
        if not step.data["provisional"]:
            assert any(grow.start <= step.start <= step.end <= grow.end for grow in grows)


def test_tracing_changes_no_token(run: Run) -> None:
    assert run.fast.token_ids == run.untraced.token_ids
    assert run.plain.token_ids == run.fast.token_ids[:4]


def test_a_plain_run_has_passes_without_trees(run: Run) -> None:
    assert tuple(each.bonus for each in passes_of(run.plain_trace)) == run.plain.token_ids
    assert not run.plain_trace.named("draft", "step")


def test_the_views_take_a_real_trace(run: Run, tmp_path: Path) -> None:
    for trace in (run.fast_trace, run.plain_trace):
        write_chrome(trace, tmp_path / "x.json")
        assert "passes" in printed(summary_table(trace))
    assert "' " in printed(token_tree(run.fast_trace, 1))  # texts, not ids
