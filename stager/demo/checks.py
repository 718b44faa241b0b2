"""What the demo has to show, each as a check over what was seen and what is on disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from stager.demo.child import ChildError
from stager.demo.compare import count_tensors, loss_differences, state_differences
from stager.demo.events import read_losses
from stager.demo.leg import Aim, Leg
from stager.demo.results import Check

GONE_WITHIN_SECS = 10.0
STOCK_LOAD_TIMEOUT_SECS = 300.0
PROBLEMS_SHOWN = 20


def check_kills(legs: Sequence[Leg], num_wanted: int) -> Check:
    """The trainer was killed in the middle of a save, as often as it should be."""
    kills = [leg.kill for leg in legs if leg.kill is not None]
    found = [f"step {kill.step} {kill.hit.value}" for kill in kills if kill.hit is not None]
    problems = (f"{len(found)} of {len(kills)} kills came in the middle of a save; {num_wanted} should have",)
    ok = len(found) >= num_wanted
    return Check("SIGKILL in the middle of a save", ok, "; ".join(found), () if ok else problems)


def check_workers_gone(legs: Sequence[Leg]) -> Check:
    """No worker outlived a killed trainer for long."""
    kills = [leg.kill for leg in legs if leg.kill is not None]
    problems = tuple(
        f"pid {pid} is alive {GONE_WITHIN_SECS:.0f} s after the kill at step {kill.step}"
        for kill in kills
        for pid in kill.left
    )
    found = [f"{kill.num_workers} workers gone after {kill.gone_secs:.1f} s" for kill in kills]
    return Check(f"No worker alive {GONE_WITHIN_SECS:.0f} s after a kill", not problems, "; ".join(found), problems)


def check_resumes(legs: Sequence[Leg]) -> Check:
    """Each leg went on from the newest checkpoint that must be valid.

    A save that was staged is finished by the workers of the dead trainer.  One that was not is discarded, unless it
    was staged after all and the trainer died before it could say so.
    """
    found, problems = [], []
    for killed, resumed in pairwise(legs):
        if killed.kill is None or resumed.resumed is None:
            problems.append(f"{resumed.name} did not resume from {killed.name}")
            continue
        safe = {*killed.staged, *killed.committed} - {killed.kill.step}
        before = max(safe, default=killed.resumed.step if killed.resumed else 0)
        allowed = {killed.kill.step} if killed.kill.hit is not Aim.STAGING else {before, killed.kill.step}
        step = resumed.resumed.step
        outcome = "finished by the workers" if step == killed.kill.step else f"save {killed.kill.step} discarded"
        found.append(f"from step {step} ({outcome})")
        if step not in allowed:
            problems.append(f"resumed from step {step}, expected {' or '.join(map(str, sorted(allowed)))}")
    problems += [f"save at step {failed.step}: {failed.error}" for leg in legs for failed in leg.failed]
    return Check("Resumed from the newest valid checkpoint", not problems, "; ".join(found), tuple(problems))


def check_losses(expected: Path, legs: Sequence[Leg], steps: int) -> Check:
    """Every loss of every leg is, bit for bit, the uninterrupted run's; and the last leg reached the end."""
    truth = read_losses(expected)
    problems: list[str] = []
    num_compared = 0
    for leg in legs:
        losses = read_losses(leg.losses)
        num_compared += len(losses)
        problems += loss_differences(truth, losses, leg.name)
    last = read_losses(legs[-1].losses)
    for name, run in (("the uninterrupted run", truth), (legs[-1].name, last)):
        if max(run, default=0) != steps:
            problems.append(f"{name} ended at step {max(run, default=0)} of {steps}")
    detail = f"{num_compared} losses, of which {len(last)} after the last resume"
    return Check("Losses equal, bit for bit", not problems, detail, tuple(problems[:PROBLEMS_SHOWN]))


def check_final_state(expected: Path, actual: Path) -> Check:
    """Weights, optimizer, scheduler, data order and RNG state at the end are, bit for bit, the uninterrupted run's."""
    truth = torch.load(expected, weights_only=True, mmap=True)
    problems = list(state_differences(truth, torch.load(actual, weights_only=True, mmap=True), "state"))
    num_tensors, nbytes = count_tensors(truth)
    detail = f"{num_tensors} tensors, {nbytes / 1e6:.1f} MB: {', '.join(truth)}"
    return Check("Final state equal, bit for bit", not problems, detail, tuple(problems[:PROBLEMS_SHOWN]))


def check_stock_load(expected: Path, checkpoint: Path) -> Check:
    """Stock ``dcp.load``, in a process that never imports stager, reads the uninterrupted run's final weights."""
    name = "Stock dcp.load, no stager imported, equal"
    try:
        found = run_stock_load(expected, checkpoint)
    except ChildError as error:
        return Check(name, False, f"{checkpoint.name} was not loaded", (str(error),))
    detail = f"{checkpoint.name}: {found['num_tensors']} tensors, {found['nbytes'] / 1e6:.1f} MB, {found['secs']:.2f} s"
    problems = tuple(f"{path} differs" for path in found["differences"][:PROBLEMS_SHOWN])
    return Check(name, not problems, detail, problems)


def run_stock_load(expected: Path, checkpoint: Path) -> dict[str, Any]:
    """Run the script of ``stock_load.py`` in a process of its own, in an empty directory.

    Raises:
        ChildError: the script failed, or imported stager; the message holds what it wrote.
    """
    source = resources.files("stager.demo").joinpath("stock_load.py").read_text(encoding="utf-8")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    with tempfile.TemporaryDirectory() as empty:
        ended = subprocess.run(
            [sys.executable, "-c", source, str(checkpoint), str(expected)],
            cwd=empty,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=STOCK_LOAD_TIMEOUT_SECS,
        )
    if ended.returncode != 0:
        raise ChildError(f"the script that loads with stock PyTorch failed:\n{ended.stderr.strip()}")
    result: dict[str, Any] = json.loads(ended.stdout)
    return result
