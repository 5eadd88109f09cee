"""A trace as a picture: one lane an actor, the tokens accepted so far on top."""

from pathlib import Path
from typing import Any

from llmcad_actors.errors import UserError
from llmcad_actors.trace_file import Trace
from llmcad_actors.trace_views import Pass, passes_of

BARS: tuple[tuple[int, str, str, str, bool | None], ...] = (
    # lane from the bottom, actor, event, colour, provisional?
    (0, "loader", "read", "#4c78a8", None),
    (0, "loader", "put", "#9ecae9", None),
    (1, "verifier", "compute", "#54a24b", None),
    (1, "verifier", "stall", "#e45756", None),
    (2, "draft", "step", "#f58518", False),
    (2, "draft", "step", "#ffbf79", True),
    (3, "coordinator", "grow", "#b279a2", None),
    (3, "coordinator", "verify", "#bab0ac", None),
)
LANE_NAMES = ("loader", "verifier", "draft", "coordinator")
TITLES = {
    "read": "disk read",
    "put": "put into the store",
    "compute": "layer computed",
    "stall": "stall",
    "grow": "growing",
    "verify": "verifying",
}


def draw(trace: Trace, path: Path) -> None:
    """Write the picture to `path` (its ending decides the format).

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
    _draw_tokens(top, passes_of(trace), trace.header.started)
    _draw_lanes(bottom, trace)
    top.set_title(f"{Path(trace.header.target).name}, {trace.header.date}")
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write the picture {path}: {error}") from None
    finally:
        pyplot.close(figure)


def _draw_tokens(axes: Any, passes: list[Pass], zero: float) -> None:
    times, counts, total = [0.0], [0], 0
    for each in passes:
        total += each.num_tokens
        times.append(each.end - zero)
        counts.append(total)
    axes.step(times, counts, where="post", color="black")
    axes.set_ylabel("tokens accepted")
    axes.grid(alpha=0.3)


def _draw_lanes(axes: Any, trace: Trace) -> None:
    zero = trace.header.started
    for lane, actor, name, colour, provisional in BARS:
        events = [
            event
            for event in trace.named(actor, name)
            if provisional is None or bool(event.data["provisional"]) is provisional
        ]
        title = TITLES.get(name) or ("draft step during a pass" if provisional else "draft step")
        spans = [(event.start - zero, event.seconds) for event in events]
        # Puts overlap reads: they get the lane's lower part.
        low, height = (lane - 0.4, 0.25) if name == "put" else (lane - 0.15 if name == "read" else lane - 0.4, 0.8)
        height = 0.55 if name == "read" else height
        axes.broken_barh(spans, (low, height), color=colour, label=title, linewidth=0)
    for each in passes_of(trace):
        axes.axvline(each.end - zero, color="black", linewidth=0.4, alpha=0.5)
    axes.set_yticks(range(len(LANE_NAMES)), LANE_NAMES)
    axes.set_xlabel("seconds")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=4, frameon=False)
