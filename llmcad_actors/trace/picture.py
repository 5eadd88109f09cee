"""A trace as a picture: one lane an actor, the tokens accepted so far on top."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmcad_actors.core.quoting import shown
from llmcad_actors.errors import UserError
from llmcad_actors.trace.file import Trace, TraceEvent
from llmcad_actors.trace.views import Pass, passes_of

LANES = ("loader", "verifier", "draft", "coordinator")  # from the bottom


@dataclass(frozen=True, slots=True)
class Bar:
    """How one kind of event is drawn."""

    lane: str
    event: str
    title: str
    colour: str
    low: float = -0.4  # in its lane, whose middle is 0
    high: float = 0.4
    provisional: bool | None = None  # of draft steps

    def shows(self, event: TraceEvent) -> bool:
        return self.provisional is None or bool(event.data["provisional"]) is self.provisional


BARS = (
    Bar("loader", "read", "disk read", "#4c78a8"),
    Bar("verifier", "compute", "layer computed", "#54a24b"),
    Bar("verifier", "stall", "stall", "#e45756"),
    Bar("draft", "step", "draft step", "#f58518", provisional=False),
    Bar("draft", "step", "draft step during a pass", "#ffbf79", provisional=True),
    Bar("coordinator", "grow", "growing", "#b279a2"),
    Bar("coordinator", "verify", "verifying", "#bab0ac"),
)


def draw(trace: Trace, path: Path) -> None:
    """Write the picture to `path`, whose ending decides the format.

    Raises `UserError` where matplotlib is missing or the file cannot be written.
    """
    try:
        import matplotlib
    except ImportError:
        raise UserError("pictures need matplotlib: pip install 'llmcad-actors[plot]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (top, bottom) = pyplot.subplots(
        2, 1, sharex=True, figsize=(14, 6), height_ratios=(1, 3), layout="constrained"
    )
    top.set_title(shown(f"{Path(trace.header.target).name}, {trace.header.date}"), parse_math=False)
    _draw_tokens(top, passes_of(trace), trace.header.started)
    _draw_lanes(bottom, trace)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write the picture {shown(path)}: {shown(error)}") from None
    finally:
        pyplot.close(figure)


def _draw_tokens(axes: Any, passes: list[Pass], zero: float) -> None:
    times, counts = [0.0], [0]
    for each in passes:
        times.append(each.end - zero)
        counts.append(counts[-1] + each.num_tokens)
    axes.step(times, counts, where="post", color="black")
    axes.set_ylabel("tokens accepted")
    axes.grid(alpha=0.3)


def _draw_lanes(axes: Any, trace: Trace) -> None:
    zero = trace.header.started
    for bar in BARS:
        events = [event for event in trace.named(bar.lane, bar.event) if bar.shows(event)]
        spans = [(event.start - zero, event.seconds) for event in events]
        bottom = LANES.index(bar.lane) + bar.low
        axes.broken_barh(spans, (bottom, bar.high - bar.low), color=bar.colour, label=bar.title, linewidth=0)
    for each in passes_of(trace):
        axes.axvline(each.end - zero, color="black", linewidth=0.4, alpha=0.5)
    axes.set_yticks(range(len(LANES)), LANES)
    axes.set_xlabel("seconds")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=4, frameon=False)
