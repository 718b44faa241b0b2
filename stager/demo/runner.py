"""Runs one leg in a job of its own, and kills it where a trap says."""

from __future__ import annotations

import time
from dataclasses import dataclass

from stager.demo.bars import Bar
from stager.demo.events import Event, RankEvent, Resumed, SaveBegun, SaveCommitted, StepDone
from stager.demo.job import Job
from stager.demo.leg import Aim, Kill, Leg, Trap
from stager.workers.checkpoint.directory.run_directory import partial_names
from stager.workers.checkpoint.documents.names import checkpoint_name, parse_partial

GONE_WITHIN_SECS = 10.0


@dataclass(frozen=True)
class _Shot:
    """A SIGKILL that was sent."""

    aim: Aim
    step: int
    time: float
    partial: bool


class LegRunner:
    """Runs one leg.

    Args:
        leg: takes what the ranks say, and the kill.
        checkpoints: what the ranks resume from and save to.
        bar: shows what rank 0 does.
    """

    def __init__(self, leg: Leg, checkpoints: str, bar: Bar) -> None:
        self._leg = leg
        self._checkpoints = checkpoints
        self._bar = bar
        self._num_workers = 0

    def run_to_end(self, job: Job) -> None:
        """Listen until the job has ended, which nothing kills.

        Raises:
            JobError: it failed.
        """
        for said in job.events():
            self._hear(said)
        job.wait()

    def run_to_kill(self, job: Job, trap: Trap) -> None:
        """Kill the last rank, or all, when the trap says so; see to the end of the job and of its workers.

        Raises:
            JobError: the job failed before.
        """
        shot: _Shot | None = None
        for said in job.events():  # after a kill: what the ranks had still said before they died
            self._hear(said)
            if shot is None:
                self._count_workers(job, said.event)
                shot = self._shoot(job, trap, said)
        if shot is None:
            job.wait()
            return
        exit_code = job.exit_code()
        ended_secs = time.time() - shot.time
        gone_secs, left = job.wait_until_gone(GONE_WITHIN_SECS)
        self._leg.kill = Kill(
            shot.aim,
            shot.step,
            shot.time,
            staged=self._leg.is_staged(shot.step),
            committed=self._leg.is_committed(shot.step),
            partial=shot.partial,
            num_workers=self._num_workers,
            exit_code=exit_code,
            ended_secs=ended_secs,
            gone_secs=gone_secs,
            left=tuple(left),
        )
        self._bar.say(f"killed in the save at step {shot.step}")

    def _hear(self, said: RankEvent) -> None:
        self._leg.note(said)
        if said.rank == 0:
            show(self._bar, said.event)

    def _count_workers(self, job: Job, event: Event) -> None:
        """Count them while the ranks live, because they may be gone right after the kill; and once there are all."""
        warmed_up = isinstance(event, SaveBegun) or len(self._leg.first.steps) > 1
        if warmed_up and not self._num_workers:
            self._num_workers = len(job.workers_alive())

    def _shoot(self, job: Job, trap: Trap, said: RankEvent) -> _Shot | None:
        step = trap.sprung_by(self._leg, said)
        if step is None:
            return None
        at = time.time()
        if trap.aim is Aim.WRITING:
            job.kill()
        else:
            job.kill_rank(self._leg.num_ranks - 1)
        return _Shot(trap.aim, step, at, has_partial(self._checkpoints, step))


def show(bar: Bar, event: Event) -> None:
    """Show on a bar what a training process said."""
    match event:
        case Resumed():
            bar.reach(event.step)
            bar.say(f"from step {event.step}")
        case StepDone():
            bar.reach(event.step)
        case SaveCommitted():
            bar.say(f"step {event.step} committed")


def has_partial(checkpoints: str, step: int) -> bool:
    """Whether a save of this step has begun to be written and is not committed."""
    return any(parse_partial(name)[0] == checkpoint_name(step) for name in partial_names(checkpoints))
