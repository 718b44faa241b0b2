"""The demo's picture: the timeline of each save and, beside it, the time lost per save, or the losses of every run."""

from __future__ import annotations

import textwrap
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from stager.demo.events import read_losses
from stager.demo.leg import Leg, ranks_text
from stager.demo.results import Measurement, Results
from stager.demo.timeline import SaveLine, save_lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette: told apart with any colour vision.
PART_COLOURS = {"staged": "#E69F00", "written": "#56B4E9", "synced": "#0072B2", "committed": "#009E73"}
BLOCKED_COLOUR = "#000000"
KILL_COLOUR = "#D55E00"
METHOD_COLOUR = "#56B4E9"
GREY = "#666666"
BAND_COLOURS = ("#ffffff", "#f3f3f3")
# A shape for each run beside its colour.
RUN_STYLES = (("#E69F00", "o"), ("#0072B2", "s"), ("#009E73", "^"), ("#CC79A7", "v"), ("#56B4E9", "D"))

ROWS_SHOWN = 16
BAR_HEIGHT = 0.5
MS = 1e3


def draw_chart(results: Results, path: Path) -> None:
    """Write the PNG.  Its right half shows the measured lost time, or without it the losses of every run."""
    figure = Figure(figsize=(13, 6.2), dpi=120, layout="constrained")
    timeline, right = figure.subplots(1, 2, width_ratios=[1.8, 1])
    _draw_timeline(timeline, save_lines(results.legs)[-ROWS_SHOWN:])
    if results.measurement is not None:
        _draw_lost_time(right, results.measurement)
    elif results.legs:
        _draw_losses(right, results.truth, [*results.legs, *results.others])
    figure.savefig(path)


def _draw_timeline(axes: Axes, lines: list[SaveLine]) -> None:
    """The saves, one under the other, from the call to the commit."""
    _draw_legs(axes, [line.leg for line in lines])
    for row, line in enumerate(lines):
        _draw_save(axes, row, line)
    longest = max((max([*line.milestones.values(), line.killed_secs or 0.0]) for line in lines), default=1.0)
    axes.set_xlim(0, longest * MS * 1.04)
    axes.set_ylim(max(len(lines), 1) - 0.5, -0.5)
    axes.set_yticks(range(len(lines)), [line.label for line in lines])
    axes.set_xlabel("time since save() was called (ms)")
    _finish(axes, "Each save, while training goes on", grid="x")
    axes.legend(handles=_timeline_legend(), loc="upper center", bbox_to_anchor=(0.5, -0.11), ncols=4, frameon=False)


def _draw_legs(axes: Axes, legs: list[str]) -> None:
    """A band behind the saves of each training process, named at the right edge."""
    first = 0
    for number, (name, rows) in enumerate(groupby(legs)):
        last = first + len(list(rows))
        axes.axhspan(first - 0.5, last - 0.5, color=BAND_COLOURS[number % 2], linewidth=0, zorder=0)
        axes.text(
            1.008,
            (first + last - 1) / 2,
            textwrap.fill(name, 12),
            transform=axes.get_yaxis_transform(),
            rotation=270,
            va="center",
            ha="left",
            fontsize=9,
            color=GREY,
        )
        first = last


def _draw_save(axes: Axes, row: int, line: SaveLine) -> None:
    start = 0.0
    for part, end in line.milestones.items():
        axes.barh(row, (end - start) * MS, left=start * MS, height=BAR_HEIGHT, color=PART_COLOURS[part])
        start = end
    if "committed" in line.milestones:
        axes.plot(start * MS, row, "D", markersize=7, color=PART_COLOURS["committed"], clip_on=False)
    if line.blocked_secs is not None:
        top = row - BAR_HEIGHT / 2
        axes.barh(top, line.blocked_secs * MS, height=0.14, color=BLOCKED_COLOUR, align="center")
    axes.vlines([end * MS for end in line.step_ends], row + 0.29, row + 0.43, color=GREY, linewidth=1.2)
    if line.killed_secs is not None:
        axes.plot(line.killed_secs * MS, row, "X", markersize=10, color=KILL_COLOUR, clip_on=False)
        axes.annotate(
            f"trainer killed; {line.ending}",
            (line.killed_secs * MS, row),
            xytext=(12, 0),
            textcoords="offset points",
            va="center",
            color=KILL_COLOUR,
            fontsize=9,
        )


def _timeline_legend() -> list[Patch | Line2D]:
    return [
        Patch(color=BLOCKED_COLOUR, label="blocked (the call)"),
        *(Patch(color=PART_COLOURS[part], label=part) for part in ("staged", "written", "synced")),
        Line2D([], [], color=PART_COLOURS["committed"], marker="D", markersize=7, linestyle="none", label="committed"),
        Line2D([], [], color=GREY, marker="|", markersize=8, linestyle="none", label="a training step ends"),
        Line2D([], [], color=KILL_COLOUR, marker="X", markersize=9, linestyle="none", label="SIGKILL of the trainer"),
    ]


def _draw_lost_time(axes: Axes, measurement: Measurement) -> None:
    methods = measurement.methods
    places = range(len(methods))
    left_of_middle = [place - 0.1 for place in places]
    lost = [method.lost_secs * MS for method in methods]
    blocked = [method.blocked_secs * MS for method in methods]
    bars = axes.bar(left_of_middle, lost, width=0.44, color=METHOD_COLOUR, label="time lost by the loop (median)")
    axes.bar(left_of_middle, blocked, width=0.14, color=BLOCKED_COLOUR, label="of which the call blocked (median)")
    axes.bar_label(bars, [f"{value:.0f} ms" for value in lost], padding=4, fontweight="bold")
    samples = [(place + 0.24, sample.lost_secs * MS) for place in places for sample in methods[place].samples]
    axes.plot(*zip(*samples, strict=True), "o", markersize=4, markerfacecolor="white", color=GREY, label="one save")
    values = [value for _, value in samples]
    axes.set_ylim(min(0.0, *values) * 1.1, max(*values, *blocked) * 1.18)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xlim(-0.5, len(methods) - 0.5)
    axes.set_xticks(places, [method.method for method in methods])
    axes.set_ylabel("time lost per save (ms)")
    _finish(axes, "What a save costs the training loop", grid="y")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), frameon=False)


def _draw_losses(axes: Axes, truth: Leg, legs: list[Leg]) -> None:
    expected = _losses(truth)
    axes.plot(list(expected), list(expected.values()), color=GREY, linewidth=5, alpha=0.4, label="uninterrupted")
    for number, leg in enumerate(legs):
        colour, marker = RUN_STYLES[number % len(RUN_STYLES)]
        found = _losses(leg)
        axes.plot(
            list(found),
            list(found.values()),
            color=colour,
            marker=marker,
            markersize=max(3.0, 8.0 - number),  # a run drawn on top of others leaves a part of them to see
            linewidth=1,
            markerfacecolor="white",
            label=f"{ranks_text(leg.num_ranks)}, {leg.origin}",
        )
        if leg.kill is not None and found:
            axes.plot(max(found), found[max(found)], "X", markersize=10, color=KILL_COLOUR, clip_on=False, zorder=5)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per byte)")
    _finish(axes, "The losses of each run (X: SIGKILL)", grid="both")
    axes.legend(frameon=False)


def _losses(leg: Leg) -> dict[int, float]:
    return {step: float.fromhex(bits) for step, bits in read_losses(leg.losses).items()}


def _finish(axes: Axes, title: str, grid: Literal["x", "y", "both"]) -> None:
    axes.set_title(title, loc="left", fontweight="bold")
    axes.grid(axis=grid, color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
