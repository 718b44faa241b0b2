"""The report: the table of faults and outcomes, the longest recoveries, the violations, and the JSON file."""

from __future__ import annotations

import json
import os
import platform
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from stager.stress.config import Kind, StressConfig
from stager.stress.record import EpisodeResult, FaultOutcome, FaultResult
from stager.workers._version import __version__

_RECOVERIES_SHOWN = 3
_VIOLATIONS_SHOWN = 10


@dataclass
class Summary:
    """The results of all episodes of one command."""

    seed: int
    out: str
    results: list[EpisodeResult] = field(default_factory=list)
    left_out: dict[Kind, str] = field(default_factory=dict)
    secs: float = 0.0
    interrupted: bool = False

    @property
    def ok(self) -> bool:
        """Whether all episodes were played and none had a violation."""
        return not self.violated and not self.interrupted

    def add(self, result: EpisodeResult) -> None:
        """Count an episode."""
        self.results.append(result)

    @property
    def violated(self) -> list[EpisodeResult]:
        """The episodes with violations."""
        return [result for result in self.results if result.violations]

    @property
    def counts(self) -> dict[str, int]:
        """The totals over all episodes."""
        results = self.results
        return {
            "episodes": len(results),
            "runs": sum(r.num_runs for r in results),
            "saves": sum(r.num_saves for r in results),
            "committed": sum(r.num_committed for r in results),
            "failed": sum(r.num_failed for r in results),
            "skipped": sum(r.num_skipped for r in results),
            "faults": sum(o.outcome is not FaultResult.NOT_MET for r in results for o in r.outcomes),
            "violations": sum(len(r.violations) for r in results),
        }

    def line(self) -> str:
        """The summary in one line."""
        return "  ".join(f"{count} {what}" for what, count in self.counts.items() if what not in ("failed", "skipped"))

    def table(self) -> dict[str, Counter[FaultResult]]:
        """Count the outcomes of faults, by label of the fault."""
        counts: dict[str, Counter[FaultResult]] = {}
        for result in self.results:
            for outcome in result.outcomes:
                counts.setdefault(outcome.fault.label, Counter())[outcome.outcome] += 1
        return dict(sorted(counts.items()))

    def longest(self) -> list[tuple[EpisodeResult, FaultOutcome]]:
        """The recoveries that took longest."""
        found = [(r, o) for r in self.results for o in r.outcomes if o.recovery_secs is not None]
        return sorted(found, key=lambda pair: -(pair[1].recovery_secs or 0.0))[:_RECOVERIES_SHOWN]

    def repeat(self, result: EpisodeResult) -> str:
        """The command that plays an episode again."""
        return f"stager stress --seed {self.seed} --episode {result.episode.number}"


def print_report(summary: Summary, console: Console, as_json: bool) -> None:
    """Print the report as tables, or as the JSON that ``stress.json`` holds."""
    if as_json:
        console.out(Path(summary.out, "stress.json").read_text(encoding="utf-8").rstrip(), highlight=False)
        return
    if summary.table():
        console.print(_fault_table(summary))
    for result, outcome in summary.longest():
        where = f"episode {result.episode.number}"
        console.print(Text(f"  {outcome.recovery_secs:6.2f} s  {where}: {outcome.fault.label}; {outcome.why}"))
    for kind, reason in summary.left_out.items():
        console.print(Text(f"left out: {kind}: {reason}", style="yellow"))
    for result in summary.violated[:_VIOLATIONS_SHOWN]:
        _print_violation(summary, result, console)
    verdict = "no violation" if not summary.violated else f"{len(summary.violated)} episode(s) with VIOLATIONS"
    verdict += " (interrupted)" if summary.interrupted else ""
    console.print(Text(f"{verdict} in {summary.secs:.0f} s, seed {summary.seed}: {summary.line()}"), soft_wrap=True)
    console.print(Text(f"every episode: {Path(summary.out, 'stress.json')}"), soft_wrap=True)


def _fault_table(summary: Summary) -> Table:
    table = Table(title="Faults and what came of them (the three longest recoveries below)", title_justify="left")
    rows = summary.table()
    shown = [outcome for outcome in FaultResult if any(row[outcome] for row in rows.values())]
    table.add_column("fault")
    for outcome in shown:
        table.add_column(outcome.value, justify="right")
    for label, row in rows.items():
        cells = [str(row[outcome] or "") for outcome in shown]
        table.add_row(label, *cells, style="bold red" if row[FaultResult.VIOLATION] else None)
    return table


def _print_violation(summary: Summary, result: EpisodeResult, console: Console) -> None:
    console.print(Text(f"VIOLATION in episode {result.episode.number}", style="bold red"))
    for violation in result.violations[:_VIOLATIONS_SHOWN]:
        console.print(Text(f"  {violation}"), soft_wrap=True)
    for fault in result.episode.faults:
        console.print(Text(f"  drawn: {fault.describe()}"), soft_wrap=True)
    console.print(Text(f"  evidence: {result.directory}"), soft_wrap=True)
    console.print(Text(f"  repeat:   {summary.repeat(result)}"), soft_wrap=True)


def write_json(summary: Summary, config: StressConfig, path: Path) -> None:
    """Write plan, outcomes and violations of every episode."""
    data = {
        "ok": not summary.violated,
        "seed": summary.seed,
        "secs": summary.secs,
        "counts": summary.counts,
        "left_out": summary.left_out,
        "faults": {
            label: {outcome.value: count for outcome, count in row.items()} for label, row in summary.table().items()
        },
        "longest_recoveries": [
            {"episode": r.episode.number, **_outcome_json(outcome)} for r, outcome in summary.longest()
        ],
        "episodes": [_episode_json(summary, result) for result in summary.results],
        "settings": config.stress.model_dump(mode="json"),
        "host": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "stager": __version__,
            "platform": platform.platform(),
            "cpu_count": os.cpu_count(),
        },
    }
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def _episode_json(summary: Summary, result: EpisodeResult) -> dict[str, Any]:
    return {
        "episode": result.episode.number,
        "repeat": summary.repeat(result),
        "secs": result.secs,
        "runs": result.num_runs,
        "saves": result.num_saves,
        "committed": result.num_committed,
        "failed": result.num_failed,
        "skipped": result.num_skipped,
        "state_bytes": result.episode.training.max_nbytes,
        "guard": result.episode.guard,
        "config": result.episode.config,
        "outcomes": [_outcome_json(outcome) for outcome in result.outcomes],
        "violations": result.violations,
        "evidence": result.directory,
    }


def _outcome_json(outcome: FaultOutcome) -> dict[str, Any]:
    return {
        "fault": asdict(outcome.fault),
        "label": outcome.fault.label,
        "outcome": outcome.outcome.value,
        "recovery_secs": outcome.recovery_secs,
        "why": outcome.why,
    }
