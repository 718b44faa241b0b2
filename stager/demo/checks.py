"""What the demo has to show, each as a check over what was seen and what is on disk."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib import resources
from itertools import pairwise
from pathlib import Path

import torch

from stager.demo.compare import count_tensors, loss_differences, state_differences
from stager.demo.events import read_losses
from stager.demo.job import JobError
from stager.demo.leg import Aim, Leg, ranks_text
from stager.demo.results import Check
from stager.demo.runner import GONE_WITHIN_SECS

STOCK_LOAD_TIMEOUT_SECS = 300.0
PROBLEMS_SHOWN = 20


def check_kills(legs: Sequence[Leg]) -> Check:
    """Check that something was killed in the middle of a save for each aim, and that no job survived it."""
    killed = [leg for leg in legs if leg.kill is not None]
    found = [_what_was_hit(leg) for leg in killed]
    problems = [
        f"no kill that should come in a save {aim.value} came in the middle of a save"
        for aim in Aim
        if not any(leg.kill.aim is aim and leg.kill.hit for leg in killed if leg.kill)
    ]
    problems += [
        f"{leg.name}: the exit code is 0 after a kill" for leg in killed if leg.kill and not leg.kill.exit_code
    ]
    return Check("SIGKILL in the middle of a save", not problems, "; ".join(found), tuple(problems))


def _what_was_hit(leg: Leg) -> str:
    assert leg.kill is not None  # of a leg that was killed
    place = f"step {leg.kill.step} {leg.kill.hit.value if leg.kill.hit else 'after its commit'}"
    if leg.num_ranks == 1:
        return place
    if leg.kill.aim is Aim.WRITING:
        return f"all ranks, {place}"
    return f"one rank, {place} (the job ended {leg.kill.ended_secs:.1f} s later)"


def check_workers_gone(legs: Sequence[Leg]) -> Check:
    """Check that no worker outlived a killed job for long."""
    kills = [leg.kill for leg in legs if leg.kill is not None]
    problems = tuple(
        f"pid {pid} is alive {GONE_WITHIN_SECS:.0f} s after the kill at step {kill.step}"
        for kill in kills
        for pid in kill.left
    )
    found = [f"{kill.num_workers} workers gone after {kill.gone_secs:.1f} s" for kill in kills]
    return Check(f"No worker alive {GONE_WITHIN_SECS:.0f} s after a kill", not problems, "; ".join(found), problems)


def check_resumes(legs: Sequence[Leg]) -> Check:
    """Check that each leg went on from the newest checkpoint that must be valid.

    A save that was staged is finished by the workers of the dead job.  One that was not is discarded, unless it was
    staged after all and a rank died before it could say so.
    """
    found, problems = [], []
    for killed, resumed in pairwise(legs):
        if killed.kill is None:
            problems.append(f"{killed.name} was not killed")
            continue
        safe = {step for step in killed.first.begun if killed.is_staged(step) or killed.is_committed(step)}
        before = max(safe - {killed.kill.step}, default=killed.first.resumed.step)
        allowed = {killed.kill.step} if killed.kill.hit is not Aim.STAGING else {before, killed.kill.step}
        step = resumed.first.resumed.step
        outcome = "finished by the workers" if step == killed.kill.step else f"save {killed.kill.step} discarded"
        found.append(f"from step {step} ({outcome})")
        if step not in allowed:
            problems.append(f"resumed from step {step}, expected {' or '.join(map(str, sorted(allowed)))}")
    problems += [problem for leg in legs for problem in _failed_saves(leg)]
    return Check("Resumed from the newest valid checkpoint", not problems, "; ".join(found), tuple(problems))


def _failed_saves(leg: Leg) -> Iterator[str]:
    """The saves that rank 0 saw fail, but the one that had to, because another rank was killed in it."""
    for failed in leg.first.failed:
        if leg.num_ranks == 1 or leg.kill is None or failed.step != leg.kill.step:
            yield f"{leg.name}: save at step {failed.step}: {failed.error}"


def check_losses(truth: Leg, legs: Sequence[Leg], steps: int) -> Check:
    """Check that every loss of every leg is the uninterrupted run's, bit for bit, and that the last leg reached the end."""
    expected = read_losses(truth.losses)
    problems: list[str] = []
    num_compared = 0
    for leg in legs:
        losses = read_losses(leg.losses)
        num_compared += len(losses)
        problems += loss_differences(expected, losses, leg.name)
    last = read_losses(legs[-1].losses)
    for name, run in (("the uninterrupted run", expected), (legs[-1].name, last)):
        if max(run, default=0) != steps:
            problems.append(f"{name} ended at step {max(run, default=0)} of {steps}")
    detail = f"{num_compared} losses, of which {len(last)} after the last resume"
    return Check("Losses equal, bit for bit", not problems, detail, tuple(problems[:PROBLEMS_SHOWN]))


def check_close(truth: Leg, leg: Leg, steps: range, tolerance: float) -> Check:
    """Check that a run resumed on another number of ranks has nearly the losses of the uninterrupted run.

    Args:
        steps: those that it must have trained.
        tolerance: largest difference allowed, in nats per byte.
    """
    expected, losses = read_losses(truth.losses), read_losses(leg.losses)
    problems = []
    if list(losses) != list(steps):
        problems.append(f"{leg.name}: steps {list(losses)} instead of {steps[0]} to {steps[-1]}")
    apart = {
        step: abs(float.fromhex(bits) - float.fromhex(expected[step]))
        for step, bits in losses.items()
        if step in expected
    }
    problems += [
        f"{leg.name}: loss of step {step} differs by {difference:.2e}"
        for step, difference in apart.items()
        if not difference <= tolerance  # so that a NaN is a problem
    ]
    problems += _failed_saves(leg)
    ranks = f"{truth.num_ranks} to {ranks_text(leg.num_ranks)}"
    detail = f"{len(apart)} losses, at most {max(apart.values(), default=0.0):.1e} apart"
    name = f"Resumed from {ranks}: losses within {tolerance:g}"
    return Check(name, not problems, detail, tuple(problems[:PROBLEMS_SHOWN]))


def check_final_state(expected: Path, actual: Path) -> Check:
    """Check weights, optimizer, scheduler, data order and random state at the end against the uninterrupted run's, bit
    for bit."""
    truth = torch.load(expected, weights_only=True, mmap=True)
    problems = list(state_differences(truth, torch.load(actual, weights_only=True, mmap=True), "state"))
    num_tensors, nbytes = count_tensors(truth)
    detail = f"{num_tensors} tensors, {nbytes / 1e6:.1f} MB: {', '.join(truth)}"
    return Check("Final state equal, bit for bit", not problems, detail, tuple(problems[:PROBLEMS_SHOWN]))


def check_stock_load(expected: Path, checkpoint: Path) -> Check:
    """Check that stock ``dcp.load``, in a process that never imports stager, reads the uninterrupted run's final state."""
    name = "Stock dcp.load, no stager imported, equal"
    with tempfile.TemporaryDirectory() as directory:
        loaded = Path(directory) / "loaded.pt"
        try:
            secs = load_with_stock(checkpoint, expected, loaded)
        except JobError as error:
            return Check(name, False, f"{checkpoint.name} was not loaded", (str(error),))
        found, truth = (torch.load(path, weights_only=True) for path in (loaded, expected))
    expected_parts = {
        name: dict(truth[name]) for name in found
    }  # a state dict may be an OrderedDict, what is loaded is not
    problems = list(state_differences(expected_parts, found, "state"))
    num_tensors, nbytes = count_tensors(found)
    detail = f"{checkpoint.name}: {num_tensors} tensors, {nbytes / 1e6:.1f} MB, {secs:.2f} s"
    return Check(name, not problems, detail, tuple(problems[:PROBLEMS_SHOWN]))


def load_with_stock(checkpoint: Path, structure: Path, loaded: Path) -> float:
    """Run the script of ``stock_load.py`` in a process of its own, in an empty directory.

    Args:
        structure: a file of ``torch.save`` with a state of the same structure.
        loaded: the file for what is loaded, in an empty directory.

    Returns:
        The seconds that loading took.

    Raises:
        JobError: the script failed, or imported stager; the message holds what it wrote.
    """
    source = resources.files("stager.demo").joinpath("stock_load.py").read_text(encoding="utf-8")
    ended = subprocess.run(
        [sys.executable, "-c", source, str(checkpoint), str(structure), str(loaded)],
        cwd=loaded.parent,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=False,
        timeout=STOCK_LOAD_TIMEOUT_SECS,
    )
    if ended.returncode != 0:
        raise JobError(f"the script that loads with stock PyTorch failed:\n{ended.stderr.strip()}")
    return float(ended.stdout)
