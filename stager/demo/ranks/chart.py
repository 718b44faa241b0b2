"""The picture of the demo on ranks: the timeline of rank 0's saves and, beside it, the losses of every run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from stager.demo.chart import GREY, KILL_COLOUR, ROWS_SHOWN, draw_timeline
from stager.demo.events import read_losses
from stager.demo.ranks.leg import JobLeg
from stager.demo.ranks.story import RanksStory
from stager.demo.timeline import save_lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, and a shape for each: told apart with any colour vision.
STYLES = (("#E69F00", "o"), ("#0072B2", "s"), ("#009E73", "^"), ("#CC79A7", "v"), ("#56B4E9", "D"))


def draw_chart(story: RanksStory, path: Path) -> None:
    """Write the PNG."""
    figure = Figure(figsize=(13, 6.2), dpi=120, layout="constrained")
    timeline, losses = figure.subplots(1, 2, width_ratios=[1.5, 1])
    draw_timeline(timeline, save_lines([leg.first for leg in story.legs])[-ROWS_SHOWN:])
    _draw_losses(losses, story)
    figure.savefig(path)


def _draw_losses(axes: Axes, story: RanksStory) -> None:
    truth = _losses(story.truth / "losses.jsonl")
    axes.plot(list(truth), list(truth.values()), color=GREY, linewidth=5, alpha=0.4, label="uninterrupted")
    for number, leg in enumerate([*story.legs, *story.others]):
        colour, marker = STYLES[number % len(STYLES)]
        found = _losses(leg.first.losses)
        axes.plot(
            list(found),
            list(found.values()),
            color=colour,
            marker=marker,
            markersize=max(3.0, 8.0 - number),  # what lies on top of others leaves something of them to see
            linewidth=1,
            markerfacecolor="white",
            label=_label(leg),
        )
        if leg.first.kill is not None and found:
            axes.plot(max(found), found[max(found)], "X", markersize=10, color=KILL_COLOUR, clip_on=False, zorder=5)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per byte)")
    axes.set_title("Each run's losses (X: SIGKILL)", loc="left", fontweight="bold")
    axes.grid(color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def _losses(path: Path) -> dict[int, float]:
    return {step: float.fromhex(bits) for step, bits in read_losses(path).items()}


def _label(leg: JobLeg) -> str:
    start = leg.first.resumed.step if leg.first.resumed else 0
    ranks = f"{len(leg.ranks)} rank{'s' * (len(leg.ranks) > 1)}"
    return f"{ranks}, resumed from step {start}" if start else f"{ranks}, from the start"
