"""``python -m tests.gpu``: see the package."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
_NEEDED = {
    "torch": "torch",
    "numpy": "numpy",
    "psutil": "psutil",
    "cloudpickle": "cloudpickle",
    "pydantic": "pydantic",
    "yaml": "PyYAML",
    "typer": "typer",
    "rich": "rich",
    "typing_extensions": "typing_extensions",
    "xxhash": "xxhash",
    "pytest": "pytest",
    "pytest_timeout": "pytest-timeout",
}
"""Modules, and the packages that have them. The dry mode also needs ninja, and a C++ compiler."""

PEERS = (
    "stager",
    "stager-guarded",
    "torch-stager",
    "dcp-thread",
    "torch-checkpointing",
    "torch-checkpointing-buffered",
)
_MINUTES = 8.0
_DRY_MINUTES = 20.0  # the simulated device works on the host's cores, and is built first
_SHARE_OF_TESTS = 0.5  # of the time
_MOST_SECS_OF_A_PEER = 90.0


def main() -> int:
    """Return 0 if all tests passed and everything that stager saved came back."""
    options = _parser().parse_args()
    missing = [package for module, package in _NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        print(f"{sys.executable} lacks {', '.join(missing)}: pip install {' '.join(missing)}", file=sys.stderr)
        return 2
    minutes = options.minutes or (_DRY_MINUTES if options.dry else _MINUTES)
    end = time.monotonic() + minutes * 60
    machine = _machine(options.dry)
    if machine is None:
        print("torch sees no accelerator here; --dry runs everything on a simulated one", file=sys.stderr)
        return 2
    name = re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
    out = options.out or (ROOT / "runs" / "gpu-dry" if options.dry else ROOT / "docs" / "results" / name)
    print(f"{machine['device']}: results go to {out}", flush=True)
    from tests.gpu import report

    tests = _run_tests(options, (end - time.monotonic()) * _SHARE_OF_TESTS)
    print(f"tests: {tests['summary']}", flush=True)
    rows: list[dict[str, Any]] = []
    for case in options.case or ("big", "small"):
        for peer in options.peer or PEERS:
            rows.append(_measure(case, peer, options, end - time.monotonic()))
            print(f"{case}, {peer}: {rows[-1]['outcome']}", flush=True)
            report.write(out, machine, tests, rows)
    print((out / "device.md").read_text())
    ours = [row for row in rows if row["peer"].startswith("stager")]
    is_right = all(row["outcome"] == "ok" and row.get("correct") for row in ours)
    return int(bool(tests["failed"]) or not tests["ended"] or not is_right)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu", description="Run and measure stager on an accelerator."
    )
    parser.add_argument("--dry", action="store_true", help="on the simulated accelerator, small")
    parser.add_argument(
        "--out", type=Path, help="directory of the results; default docs/results/DEVICE, or runs/gpu-dry"
    )
    parser.add_argument(
        "--minutes", type=float, help="for everything; what does not fit is left out; default 8, or 20 with --dry"
    )
    parser.add_argument("--directory", type=Path, help="save there; default: the temporary directory")
    parser.add_argument("--case", action="append", choices=("big", "small"))
    parser.add_argument("--peer", action="append", choices=PEERS)
    parser.add_argument("--tests", nargs="*", default=["tests/device", "tests/gpu"], help="what pytest is given")
    return parser


def _environment(dry: bool) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    simulated = {"STAGER_SIMULATED": "late"} if dry else {}
    return {**os.environ, "PYTHONPATH": path, **simulated}


def _machine(dry: bool) -> dict[str, str] | None:
    """Look at the machine, in a process of its own: this one is to have no context on the device."""
    command = (
        "import torch; kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None\n"
        "name = getattr(torch.get_device_module(kind), 'get_device_name', lambda: kind.type)() if kind else ''\n"
        "count = torch.accelerator.device_count() if kind else 0\n"
        "print(name, count, torch.__version__, torch.version.cuda or torch.version.hip or 'none', sep='\\n')"
    )
    said = subprocess.run([sys.executable, "-c", command], check=True, capture_output=True, text=True).stdout
    name, count, torch_version, runtime = said.splitlines()
    if dry:
        name, count = "simulated", "2"
    if not name:
        return None
    head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], check=False, capture_output=True, text=True)
    return {
        "device": name,
        "devices": count,
        "torch": torch_version,
        "CUDA or ROCm of torch": runtime,
        "Python": platform.python_version(),
        "kernel": platform.release(),
        "cores": str(len(os.sched_getaffinity(0))),
        "commit": head.stdout.strip() or "unknown",
        "date": time.strftime("%Y-%m-%d"),
    }


def _run_tests(options: argparse.Namespace, secs: float) -> dict[str, Any]:
    """Run pytest; what has not ended in time is killed, and said to be missing."""
    if not options.tests:
        return {"summary": "not run", "failed": [], "ended": True}
    with tempfile.TemporaryDirectory() as directory:
        results = Path(directory, "results.xml")
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            f"--junitxml={results}",
            *options.tests,
        ]
        with open(Path(directory, "log"), "w+") as log:
            process = subprocess.Popen(command, cwd=ROOT, env=_environment(options.dry), stdout=log, stderr=log)
            try:
                process.wait(max(secs, 1.0))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            log.seek(0)
            lines = log.read().splitlines()
        if not results.exists():
            shown = "\n".join(lines[-20:])
            return {
                "summary": f"did not end within {secs:.0f} s, or could not begin:\n{shown}",
                "failed": [],
                "ended": False,
            }
        return _summary(results)


def _summary(results: Path) -> dict[str, Any]:
    cases = list(ElementTree.parse(results).getroot().iter("testcase"))
    failed = [f"{c.get('classname')}::{c.get('name')}" for c in cases if {"failure", "error"} & {e.tag for e in c}]
    skipped = sum("skipped" in {e.tag for e in c} for c in cases)
    passed = len(cases) - len(failed) - skipped
    return {
        "summary": f"{passed} passed, {skipped} skipped, {len(failed)} failed",
        "failed": failed,
        "ended": passed + len(failed) > 0,
    }


def _measure(case: str, peer: str, options: argparse.Namespace, left_secs: float) -> dict[str, Any]:
    row: dict[str, Any] = {"case": case, "peer": peer, "outcome": "no time was left"}
    if left_secs < 5:
        return row
    scale, saves = ("0.005", "2") if options.dry else ("1", "5")
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        out = Path(directory, "figures.json")
        checkpoints = Path(directory, "checkpoints")
        checkpoints.mkdir()
        command = [sys.executable, "-m", "tests.gpu.measure", case, peer, scale, saves, str(checkpoints), str(out)]
        command += ["--dry"] if options.dry else []
        secs = min(_MOST_SECS_OF_A_PEER, left_secs)
        try:
            ended = subprocess.run(
                command,
                cwd=ROOT,
                env=_environment(options.dry),
                capture_output=True,
                text=True,
                timeout=secs,
                check=False,
            )
            said = (ended.stderr.strip().splitlines() or ["nothing was said"])[-1]
            problem = f"ended with {ended.returncode}: {said[:300]}"
        except subprocess.TimeoutExpired:
            problem = f"not done after {secs:.0f} s"
        found: dict[str, Any] = json.loads(out.read_text()) if out.exists() else row
        return found if found["outcome"] not in ("did not finish", row["outcome"]) else {**found, "outcome": problem}


if __name__ == "__main__":
    sys.exit(main())
