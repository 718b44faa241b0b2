"""stager beside torch's own ways to save, in one run: ``python -m tests.benchmarks [--rounds N] [--scale X] [--out FILE]``.

The peers take turns in every round, so that whatever else the machine does falls on all of them alike. Reported are medians
with minimum and maximum, and ratios to memcpy and to a raw write + fsync of the same bytes, measured in the same rounds.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from stager import __version__
from tests.benchmarks.cases import CASES, Case, State
from tests.benchmarks.peers import PEERS, quiet

Samples = dict[str, dict[str, list[float]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="size of the states, 1.0 is the published one")
    parser.add_argument("--case", choices=sorted(CASES), action="append")
    parser.add_argument("--directory", type=Path, help="where to write (default: a temporary directory)")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    quiet()
    results: dict[str, Any] = {"machine": _machine(), "cases": {}}
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        for name in arguments.case or CASES:
            samples = measure(CASES[name], Path(directory) / name, arguments.rounds, arguments.scale)
            results["cases"][name] = {"what": CASES[name].what, "scale": arguments.scale, "samples": samples}
            Console(width=140).print(_table(CASES[name], samples))
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")


def measure(case: Case, directory: Path, rounds: int, scale: float) -> Samples:
    """Seconds, by peer and figure; the first round is kept apart as "first"."""
    directory.mkdir(parents=True)
    state = case.make(scale)
    samples: Samples = defaultdict(lambda: defaultdict(list))
    with ExitStack() as stack:
        opened = [(peer, *stack.enter_context(peer.open(directory / str(i)))) for i, peer in enumerate(PEERS)]
        for step in range(rounds + 1):
            _measure_limits(state, directory, samples)
            for peer, save, load in opened:
                timing = save(step, state)
                figures = samples[peer.name]
                figures["blocked, first" if step == 0 else "blocked"].append(timing.blocked_secs)
                figures["stored, first" if step == 0 else "stored"].append(timing.stored_secs)
                started = time.perf_counter()
                load(step, state)
                figures["load"].append(time.perf_counter() - started)
    return {name: dict(figures) for name, figures in samples.items()}


def _measure_limits(state: State, directory: Path, samples: Samples) -> None:
    """What the machine can do with the same bytes: one memcpy, one write + fsync."""
    nbytes = sum(tensor.nbytes for tensor in state.values())
    source, target = torch.ones(nbytes, dtype=torch.uint8), torch.ones(nbytes, dtype=torch.uint8)
    started = time.perf_counter()
    ctypes.memmove(target.data_ptr(), source.data_ptr(), nbytes)
    samples["limits"]["memcpy, one thread"].append(time.perf_counter() - started)
    path = directory / "raw"
    view = memoryview(source.numpy())
    started = time.perf_counter()
    with open(path, "wb", buffering=0) as file:
        for start in range(0, nbytes, 16 << 20):
            file.write(view[start : start + (16 << 20)])
        os.fsync(file.fileno())
    samples["limits"]["write + fsync"].append(time.perf_counter() - started)
    path.unlink()


def _table(case: Case, samples: Samples) -> Table:
    table = Table(title=f"{case.name}: {case.what} (seconds: median, min to max)")
    columns = ("blocked, first", "blocked", "stored, first", "stored", "load")
    for column in ("", *columns):
        table.add_column(column, justify="right" if column else "left")
    for peer in PEERS:
        table.add_row(peer.name, *[_cell(samples[peer.name].get(column, [])) for column in columns])
    for limit, values in samples["limits"].items():
        table.add_row(
            limit,
            *[
                _cell(values) if (limit[0] == "m") == (c == "blocked") and c in ("blocked", "stored") else ""
                for c in columns
            ],
        )
    return table


def _cell(values: list[float]) -> str:
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def _machine() -> dict[str, Any]:
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "stager": __version__,
    }


def _cpu_name() -> str:
    with open("/proc/cpuinfo") as file:
        return next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
