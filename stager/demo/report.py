"""The demo's tables, and ``results.json``."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from stager.config.host import usable_cores
from stager.demo.config import DemoConfig
from stager.demo.leg import Kill
from stager.demo.results import Check, LostTime, Measurement, Results
from stager.demo.timeline import save_lines
from stager.demo.workspace import Workspace

# What each method means by "complete", which is not the same.
COMPLETE = {
    "stager": "written, synced, committed",
    "torch.save": "in the page cache",
    "dcp.async_save": "files synced",
}


def print_report(results: Results, config: DemoConfig, workspace: Workspace, console: Console, as_json: bool) -> None:
    """Print tables and the path of the chart; or, as JSON, what ``results.json`` holds."""
    if as_json:
        console.out(workspace.results.read_text(encoding="utf-8").rstrip(), highlight=False)
        return
    console.print(_checks_table(results.checks))
    for check in results.checks:
        for problem in check.problems:
            console.print(Text(f"  {check.name}: {problem}", style="red"), soft_wrap=True)
    if results.measurement is not None:
        console.print(_lost_time_table(results.measurement))
        console.print(_setting(results.measurement, config), style="dim")
    verdict = "all shown" if results.ok else "NOT all shown"
    console.print(f"{verdict} in {results.elapsed_secs:.0f} s")
    for label, path in (("chart", workspace.chart), ("results", workspace.results)):
        console.print(Text(f"{label}: {path}"), soft_wrap=True)


def write_results(results: Results, config: DemoConfig, workspace: Workspace) -> None:
    """Write ``results.json``: checks, kills, saves, every measured sample, versions."""
    workspace.results.write_text(json.dumps(_as_json(results, config, workspace), indent=2), encoding="utf-8")


def _checks_table(checks: list[Check]) -> Table:
    table = Table(title="What was shown", title_justify="left")
    table.add_column("check")
    table.add_column("result")
    table.add_column("what was compared or seen")
    for check in checks:
        verdict = Text("yes", style="green") if check.ok else Text("NO", style="bold red")
        table.add_row(check.name, verdict, check.detail)
    return table


def _lost_time_table(measurement: Measurement) -> Table:
    table = Table(title="Time the training loop lost per save (medians)", title_justify="left")
    table.add_column("method")
    table.add_column("call blocked", justify="right")
    table.add_column("time lost", justify="right")
    table.add_column("least to most", justify="right")
    table.add_column("lost, stager = 1", justify="right")
    table.add_column("complete after", justify="right")
    table.add_column("complete means")
    for method in measurement.methods:
        low, high = method.lost_range_secs
        table.add_row(
            method.method,
            f"{method.blocked_secs * 1e3:.0f} ms",
            f"{method.lost_secs * 1e3:.0f} ms",
            f"{low * 1e3:.0f} to {high * 1e3:.0f} ms",
            _ratio_text(measurement, method),
            f"{method.done_secs * 1e3:.0f} ms",
            COMPLETE[method.method],
        )
    return table


def _ratio_text(measurement: Measurement, method: LostTime) -> str:
    ratio = measurement.relative_loss(method)
    if ratio is not None:
        return f"{ratio:.1f}"
    if method is measurement.methods[0]:
        return "below the noise"
    return f"> {method.lost_secs / measurement.noise_secs:.1f}"


def _setting(measurement: Measurement, config: DemoConfig) -> str:
    sample = measurement.methods[0].samples[0]
    return (
        f"saves with each: {len(measurement.methods[0].samples)}, of {sample.nbytes / 1e6:.0f} MB, taking turns; "
        f"training threads: {config.demo.threads_for(1)} on {usable_cores()} cores; "
        f"a step takes {measurement.step_secs * 1e3:.0f} ms; "
        f"equal stretches without a save differ by {measurement.noise_secs * 1e3:.0f} ms"
    )


def _as_json(results: Results, config: DemoConfig, workspace: Workspace) -> dict[str, Any]:
    return {
        "ok": results.ok,
        "elapsed_secs": results.elapsed_secs,
        "checks": [asdict(check) for check in results.checks],
        "kills": [_kill_json(leg.kill) for leg in results.legs if leg.kill is not None],
        "resumed_from": [leg.first.resumed.step for leg in results.legs],
        "saves": [asdict(line) for line in save_lines(results.legs)],
        "lost_time": dict(_lost_time_json(results.measurement)) if results.measurement else None,
        "chart": str(workspace.chart),
        "checkpoints": workspace.checkpoints,
        "config": config.model_dump(mode="json"),
        "host": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "platform": platform.platform(),
            "cores": usable_cores(),
            "cpu_count": os.cpu_count(),
            "threads": config.demo.threads_for(1),
        },
    }


def _kill_json(kill: Kill) -> dict[str, Any]:
    return asdict(kill) | {"aim": kill.aim.name.lower(), "hit": kill.hit.name.lower() if kill.hit else None}


def _lost_time_json(measurement: Measurement) -> Iterator[tuple[str, Any]]:
    yield "step_secs", measurement.step_secs
    yield "noise_secs", measurement.noise_secs
    for method in measurement.methods:
        yield (
            method.method,
            {
                "blocked_secs": method.blocked_secs,
                "lost_secs": method.lost_secs,
                "done_secs": method.done_secs,
                "lost_relative_to_stager": measurement.relative_loss(method),
                "samples": [asdict(sample) for sample in method.samples],
            },
        )
