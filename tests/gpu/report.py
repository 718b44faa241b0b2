"""What a run found, as JSON and as tables."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.benchmarks.peers import PEERS

Row = dict[str, Any]


def write(out: Path, machine: dict[str, str], tests: dict[str, Any], rows: list[Row]) -> None:
    """Write ``device.json`` and ``device.md`` into the directory ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    found = {"machine": machine, "tests": tests, "measured": rows}
    (out / "device.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "device.md").write_text("\n".join(_lines(machine, tests, rows)) + "\n")


def _lines(machine: dict[str, str], tests: dict[str, Any], rows: list[Row]) -> list[str]:
    lines = [f"# Device results: {machine['device']}", ""]
    lines += [f"- {key}: {value}" for key, value in machine.items()]
    lines += [f"- tests: {tests['summary']}"]
    lines += [f"    - failed: {name}" for name in tests["failed"]]
    lines += [
        "",
        "Medians. First: of a process; later: of the saves after it. Pinned copy: the same bytes as one block into "
        "page-locked memory. Stream blocked: what the trainer's stream lost to a save, by the device's clock.",
    ]
    for case in dict.fromkeys(row["case"] for row in rows):
        of_case = [row for row in rows if row["case"] == case]
        size = next((row for row in of_case if "nbytes" in row), None)
        about = f": {size['nbytes'] / 2**20:,.0f} MiB in {size['num_tensors']:,} tensors" if size else ""
        lines += [
            "",
            f"## {case}{about}",
            "",
            f"| | {' | '.join(COLUMNS)} |",
            "| --- " + "| ---: " * len(COLUMNS) + "|",
        ]
        for row in of_case:
            cells = [_cell(row, of) for of in COLUMNS.values()]
            lines.append(f"| {PEERS[row['peer']].title} | {' | '.join(cells)} |")
        lines += [""] + [f"- {PEERS[row['peer']].title}: {row['outcome']}" for row in of_case if row["outcome"] != "ok"]
    return lines


def _cell(row: Row, of: Callable[[Row], str]) -> str:
    try:
        return of(row)
    except (KeyError, IndexError, statistics.StatisticsError):  # not measured
        return ""


def _ms(secs: float) -> str:
    return f"{secs * 1e3:,.3g} ms"


def _later(row: Row, name: str) -> float:
    return statistics.median(row[name][1:])


COLUMNS: dict[str, Callable[[Row], str]] = {
    "call, first": lambda row: _ms(row["blocked_secs"][0]),
    "call, later": lambda row: _ms(_later(row, "blocked_secs")),
    "staged, first": lambda row: _ms(row["staged_secs"][0]),
    "staged, later": lambda row: _ms(_later(row, "staged_secs")),
    "staged, GB/s": lambda row: f"{row['nbytes'] / _later(row, 'staged_secs') / 1e9:.3g}",
    "pinned copy, GB/s": lambda row: f"{row['nbytes'] / _later(row, 'pinned_copy_secs') / 1e9:.3g}",
    "stored": lambda row: _ms(_later(row, "stored_secs")),
    "stream blocked": lambda row: _ms(statistics.median(row["stream_blocked_secs"])),
    "load": lambda row: _ms(statistics.median(row["load_secs"])),
    "loaded is right": lambda row: {True: "yes", False: "NO"}[row["correct"]],
    "workers on the device": lambda row: str(row["worker_contexts"]),
}
