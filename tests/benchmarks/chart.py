"""One picture per case: bars of medians, whiskers from the least to the most. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.benchmarks.cases import CASES, Kind
from tests.benchmarks.peers import PEERS
from tests.benchmarks.report import columns, heading, number
from tests.benchmarks.results import CaseResults, Results
from tests.benchmarks.summary import Figure, Spread, Unit

_OURS, _OTHERS, _FIRST = "#1f6f8b", "#8c8c8c", "#d08c2c"
_LOG_FROM = 20.0  # times between the shortest and the longest bar
# Panels: (title, figure, figure drawn above it in another colour)
_PANELS: dict[Kind, tuple[tuple[str, str, str | None], ...]] = {
    Kind.SAVES: (
        ("until the state may be changed", "staged", "staged, first"),
        ("until stored", "stored", "stored, first"),
        ("trainer's speed while persisting", "trainer's speed", None),
        ("peak memory of the process tree", "peak memory", None),
    ),
    Kind.LOOP: (("what one save costs the loop", "cost of a save", None), ("of it: blocked", "blocked of it", None)),
    Kind.SOAK: (("memory of the process tree", "memory at the end", "memory after 20"),),
}
_AXES = {
    Unit.SECS: "seconds",
    Unit.MIB: "MiB",
    Unit.RATIO: "share of its speed alone",
    Unit.COUNT: "",
    Unit.GB_PER_SEC: "GB/s",
}


def draw_all(results: Results, directory: Path) -> dict[str, str]:
    """Case to file name, of those that have anything to show. Empty without matplotlib."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return {}
    matplotlib.use("Agg")
    drawn = {}
    for case in results.cases.values():
        if _draw(case, directory / f"{case.name}.png"):
            drawn[case.name] = f"{case.name}.png"
    return drawn


def _draw(case: CaseResults, path: Path) -> bool:
    from matplotlib import pyplot

    figures = {figure.title: figure for figure in columns(case)}
    panels = [panel for panel in _PANELS[CASES[case.name].kind] if panel[1] in figures]
    peers = list(case.rows)
    if not panels:
        return False
    height = 1.6 + 0.42 * len(peers)
    picture, axes = pyplot.subplots(
        1, len(panels), figsize=(3.2 + 3.6 * len(panels), height), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, (title, name, above) in zip(axes[0], panels, strict=True):
        _panel(axis, case, peers, figures[name], figures.get(above or ""))
        axis.set_title(title, fontsize=10)
    for position, peer in enumerate(peers):
        if not figures[panels[0][1]].samples(case.rows[peer]):
            axes[0][0].annotate(
                case.rows[peer].outcome,
                (0, position),
                xycoords=("axes fraction", "data"),
                xytext=(4, 0),
                textcoords="offset points",
                fontsize=8,
                va="center",
                style="italic",
            )
    axes[0][0].set_yticks(range(len(peers)), [PEERS[peer].title for peer in peers], fontsize=9)
    axes[0][0].invert_yaxis()
    picture.suptitle(heading(case), fontsize=11)
    picture.savefig(path, dpi=120)
    pyplot.close(picture)
    return True


def _panel(axis: Any, case: CaseResults, peers: list[str], figure: Figure, above: Figure | None) -> None:
    spreads = [figure.spread(case.rows[peer]) for peer in peers]
    firsts = [above.spread(case.rows[peer]) if above else None for peer in peers]
    shown = [s for s in (*spreads, *firsts) if s is not None]
    logarithmic = all(s.least > 0 for s in shown) and max(s.median for s in shown) > _LOG_FROM * min(
        s.median for s in shown
    )
    if logarithmic:
        axis.set_xscale("log")
    width = 0.38 if above else 0.7
    for position, (peer, spread, opening) in enumerate(zip(peers, spreads, firsts, strict=True)):
        colour = _OURS if PEERS[peer].ours else _OTHERS
        _bar(axis, position + (0.2 if above else 0), width, spread, colour, figure.unit)
        _bar(axis, position - 0.2, width, opening, _FIRST, figure.unit)
    if above is not None:
        axis.barh([0], [float("nan")], color=_FIRST, label=above.title)
        axis.barh([0], [float("nan")], color=_OURS, label=f"{figure.title} (stager)")
        axis.barh([0], [float("nan")], color=_OTHERS, label=f"{figure.title} (others)")
        axis.legend(fontsize=7, loc="best")
    if figure.title == "trainer's speed":
        axis.axvline(1.0, color="black", linewidth=0.8)
    axis.margins(x=0.22)
    axis.set_xlabel(_AXES[figure.unit] + (", log scale" if logarithmic else ""), fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(axis="x", linewidth=0.4, alpha=0.6)
    axis.set_axisbelow(True)


def _bar(axis: Any, position: float, width: float, spread: Spread | None, colour: str, unit: Unit) -> None:
    if spread is None:
        return
    whiskers = [[spread.median - spread.least], [spread.most - spread.median]]
    axis.barh([position], [spread.median], width, xerr=whiskers, color=colour, ecolor="black", error_kw={"lw": 0.8})
    text = number(spread.median, unit)
    axis.annotate(
        text, (max(spread.most, 0), position), xytext=(3, 0), textcoords="offset points", fontsize=7, va="center"
    )
