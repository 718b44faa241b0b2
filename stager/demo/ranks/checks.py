"""What the demo on ranks has to show beside what :mod:`stager.demo.checks` looks at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stager.demo.checks import PROBLEMS_SHOWN
from stager.demo.events import read_losses
from stager.demo.ranks.leg import JobLeg, Victim
from stager.demo.results import Check


def check_job_kill(legs: Sequence[JobLeg]) -> Check:
    """All ranks and their torchrun were killed in the middle of a save."""
    found = [_what_was_hit(leg) for leg in legs if leg.victim is Victim.JOB and _is_hit(leg)]
    problems = () if found else ("the job was not killed in the middle of a save",)
    return Check("SIGKILL of the whole job in the middle of a save", bool(found), "; ".join(found), problems)


def check_rank_kill(legs: Sequence[JobLeg]) -> Check:
    """One rank was killed in the middle of a save, and the job ended with an error."""
    killed = [leg for leg in legs if leg.victim is Victim.RANK]
    found = [f"{_what_was_hit(leg)}, and the job ended {leg.end.secs:.1f} s later" for leg in killed if leg.end]
    problems = [] if any(map(_is_hit, killed)) else ["no rank was killed in the middle of a save"]
    problems += [
        f"{leg.name}: torchrun's exit code is 0, although a rank was killed"
        for leg in killed
        if leg.end is not None and leg.end.exit_code == 0
    ]
    return Check("SIGKILL of one rank in the middle of a save", not problems, "; ".join(found), tuple(problems))


def _is_hit(leg: JobLeg) -> bool:
    return leg.first.kill is not None and leg.first.kill.hit is not None


def _what_was_hit(leg: JobLeg) -> str:
    kill = leg.first.kill
    assert kill is not None  # something was killed
    return f"step {kill.step} {kill.hit.value if kill.hit else 'when it was committed'}"


def check_close(expected: Path, leg: JobLeg, num_before: int, first_step: int, steps: int, tolerance: float) -> Check:
    """The losses of a run that was resumed on another number of ranks are nearly those of the uninterrupted run.

    Args:
        expected: the losses of the uninterrupted run.
        num_before: ranks that wrote the checkpoint.
        first_step: the first after it.
        steps: the last one.
        tolerance: nats per byte.
    """
    truth, losses = read_losses(expected), read_losses(leg.first.losses)
    problems = []
    if list(losses) != list(range(first_step, steps + 1)):
        problems.append(f"{leg.name}: steps {list(losses)} instead of {first_step} to {steps}")
    apart = {
        step: abs(float.fromhex(bits) - float.fromhex(truth[step])) for step, bits in losses.items() if step in truth
    }
    problems += [
        f"{leg.name}: loss of step {step} differs by {difference:.2e}"
        for step, difference in apart.items()
        if not difference <= tolerance  # a NaN is not
    ]
    problems += [f"{leg.name}: save at step {failed.step}: {failed.error}" for failed in leg.first.failed]
    ranks = f"{num_before} to {len(leg.ranks)} rank{'s' * (len(leg.ranks) > 1)}"
    detail = f"{len(apart)} losses, at most {max(apart.values(), default=0.0):.1e} apart"
    name = f"Resumed from {ranks}: losses within {tolerance:g}"
    return Check(name, not problems, detail, tuple(problems[:PROBLEMS_SHOWN]))
