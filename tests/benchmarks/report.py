"""Tables: for the terminal, and as Markdown. Both show the same cells."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tests.benchmarks.criteria import Criterion, Verdict, evaluate
from tests.benchmarks.peers import PEERS
from tests.benchmarks.results import CaseResults, Results, Row
from tests.benchmarks.summary import Figure, Spread, Unit, figures_of, limits_of, state_of

_COLOURS = {Verdict.MET: "green", Verdict.NOT_MET: "red", Verdict.NOT_MEASURED: "dim"}
_COLUMNS = 7
_EXPLAINED = (
    "Median (least to most) of the samples. Blocked: until the call returned; staged: until the state may be changed; "
    "stored: as well as the peer stores it, see its notes. First: of a fresh process. Ratios are medians of ratios pair "
    "by pair: memcpy with stager's threads, and pwrite + fsync, of the same bytes, right before that save."
)


def cell(spread: Spread | None, unit: Unit) -> str:
    if spread is None:
        return ""
    if spread.count == 1 or spread.least == spread.most:
        return number(spread.median, unit)
    least, most = number(spread.least, unit), number(spread.most, unit)
    if least.split(" ")[1:] == most.split(" ")[1:]:
        least = least.split(" ")[0]
    return f"{number(spread.median, unit)} ({least} to {most})"


def number(value: float, unit: Unit) -> str:
    """Seconds with three figures that count; below a second in milliseconds."""
    if unit is Unit.SECS:
        return f"{value:.3g} s" if abs(value) >= 0.9995 else f"{value * 1e3:.3g} ms"
    if unit is Unit.MIB:
        return f"{value:,.0f} MiB"
    if unit is Unit.COUNT:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) < 100 else f"{value:,.0f}"


def heading(case: CaseResults) -> str:
    state = state_of(case)
    measured = f" ({state.nbytes / (1 << 20):,.1f} MiB in {state.num_tensors:,} tensors measured)" if state else ""
    return f"{case.name}: {case.what}{measured}"


def columns(case: CaseResults) -> list[Figure]:
    """Those that some peer has samples for."""
    return [figure for figure in figures_of(case.name) if any(figure.samples(row) for row in case.rows.values())]


def remarks(row: Row) -> str:
    peer = PEERS[row.peer]
    parts = [peer.note] if peer.note else []
    if row.outcome != "ok":
        parts.append(f"{row.outcome.upper()}: {row.message}")
    return "; ".join([*parts, *row.notes])


# -- the terminal ------------------------------------------------------------------------------------------------


def print_case(console: Console, case: CaseResults) -> None:
    console.print(Text(f"\n{heading(case)}", style="bold"))
    for shown in _in_parts(columns(case)):
        table = Table(box=None, padding=(0, 2, 0, 0))
        table.add_column("", no_wrap=True)
        for figure in shown:
            table.add_column(figure.title, justify="right", no_wrap=True)
        for row in case.rows.values():
            cells = [text.replace(" (", "\n(") for text in _cells(row, shown)]
            table.add_row(PEERS[row.peer].title, *cells)
        console.print(table)
    for line in limits_of(case):
        console.print(f"  limit: {line.title}: {cell(line.spread, Unit.SECS)}")
    for row in case.rows.values():
        if row.outcome != "ok" or row.notes:
            console.print(Text(f"  {PEERS[row.peer].title}: {remarks(row)}", style="yellow"))


def _in_parts(shown: list[Figure]) -> list[list[Figure]]:
    """As many tables as it takes for each to be readable."""
    return [shown[start : start + _COLUMNS] for start in range(0, len(shown), _COLUMNS)]


def _cells(row: Row, shown: list[Figure]) -> list[str]:
    """A row with nothing to show says how it failed, in short."""
    cells = [cell(figure.spread(row), figure.unit) for figure in shown]
    return cells if any(cells) or row.outcome == "ok" else [row.outcome, *cells[1:]]


def print_criteria(console: Console, results: Results) -> None:
    table = Table("", "measured", "target", "", box=None, padding=(0, 2, 0, 0))
    for line in evaluate(results):
        table.add_row(line.name, line.measured, line.target, Text(line.verdict.value, style=_COLOURS[line.verdict]))
    console.print(Text("\nWhat stager promises", style="bold"))
    console.print(table)


# -- Markdown ----------------------------------------------------------------------------------------------------


def write_markdown(results: Results, path: Path, pictures: dict[str, str]) -> None:
    """``pictures``: case to file name."""
    parts = ["# Benchmark results", "", *_facts(results), "", _EXPLAINED, "", "## What stager promises", ""]
    parts += _criteria(evaluate(results))
    for case in results.cases.values():
        parts += ["", f"## {heading(case)}", ""]
        if case.name in pictures:
            parts += [f"![{case.name}]({pictures[case.name]})", ""]
        parts += _case(case)
    path.write_text("\n".join(parts) + "\n")


def _facts(results: Results) -> list[str]:
    machine, versions = results.machine, results.versions
    virtual = ", virtual" if machine.virtual else ""
    packages = ", ".join(f"{name} {version}" for name, version in versions.packages.items())
    options = results.options
    return [
        f"- {results.date}, commit {versions.commit or 'unknown'}",
        f"- {machine.cpu}, {machine.cores} cores{virtual}, {machine.memory_bytes / (1 << 30):.1f} GiB, GPU: {machine.gpu}",
        f"- Linux {machine.kernel}, {machine.filesystem}, {machine.write_bytes_per_sec / 1e9:.2f} GB/s written and "
        f"synced, huge pages {machine.huge_pages}, {machine.nofile:,} open files",
        f"- Python {versions.python}, stager {versions.stager}, {packages}",
        f"- {options['rounds']} passes, {options['saves']} later saves in each, scale {options['scale']}, "
        f"deadline {options['deadline_secs']:g} s, seed {options['seed']}",
    ]


def _criteria(lines: list[Criterion]) -> list[str]:
    rows = ["| | measured | target | |", "| --- | ---: | ---: | --- |"]
    return rows + [f"| {c.name} | {c.measured} | {c.target} | {c.verdict.value} |" for c in lines]


def _case(case: CaseResults) -> list[str]:
    lines: list[str] = []
    for shown in _in_parts(columns(case)):
        lines += ["| " + " | ".join(["", *(figure.title for figure in shown)]) + " |"]
        lines += ["| --- " + "| ---: " * len(shown) + "|"]
        for row in case.rows.values():
            lines.append("| " + " | ".join([PEERS[row.peer].title, *_cells(row, shown)]) + " |")
        lines.append("")
    lines += [f"- Limit, over all pairs: {line.title}: {cell(line.spread, Unit.SECS)}" for line in limits_of(case)]
    return lines + [f"- {PEERS[row.peer].title}: {_escape(remarks(row))}" for row in case.rows.values() if remarks(row)]


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
