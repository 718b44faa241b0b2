"""The demo on ranks.  The ranks that torchrun has started train first; then rank 0 tells the rest alone.

1  train without interruption                  on all ranks: the truth that everything is compared with
2  train again, saving; be killed in a save    in a job of as many ranks, started by rank 0 with a torchrun of its own;
                                               SIGKILL of every rank, and of that torchrun
3  resume; lose one rank in a save             SIGKILL of the last rank; torchrun ends the job
4  resume to the end                           on as many ranks
5  resume on other numbers of ranks            from a copy of one of these checkpoints, to the end
6  compare losses and final state              bit for bit; on other numbers of ranks within a tolerance
7  load the last checkpoint with stock dcp.load
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from stager.demo.bars import Bar, Bars
from stager.demo.checks import (
    GONE_WITHIN_SECS,
    check_final_state,
    check_losses,
    check_resumes,
    check_stock_load,
    check_workers_gone,
)
from stager.demo.child import wait_until_gone
from stager.demo.events import Event, Resumed, SaveBegun, SaveCommitted, StepDone
from stager.demo.leg import Aim, Kill, has_partial
from stager.demo.ranks.checks import check_close, check_job_kill, check_rank_kill
from stager.demo.ranks.config import RanksConfig
from stager.demo.ranks.job import Job
from stager.demo.ranks.leg import End, JobLeg, JobTrap, RankTrap, Victim
from stager.demo.ranks.training import train_rank
from stager.demo.results import Results
from stager.demo.workspace import Workspace

KILL_ATTEMPTS = 3  # a save may get further before the signal arrives; then another one is aimed at


class RanksStory:
    """Plays the acts in order and keeps what was seen.

    Args:
        num_ranks: of the job that this process is rank 0 of, and of those that it starts and kills.
    """

    def __init__(self, config: RanksConfig, num_ranks: int, workspace: Workspace, bars: Bars) -> None:
        self._config = config
        self._settings = config.demo_ranks
        self._num_ranks = num_ranks
        self._workspace = workspace
        self._bars = bars
        self._num_acts = 0
        self.legs: list[JobLeg] = []
        self.others: list[JobLeg] = []
        self.results = Results()

    @property
    def truth(self) -> Path:
        """The directory of the uninterrupted run."""
        return self._workspace.run("uninterrupted")

    def train_here(self) -> None:
        """Act 1: all ranks of this job play it together; the others call :func:`train_along`."""
        bar = self._begin(f"train on {self._num_ranks} ranks without interruption")
        train_rank(self._config, self.truth, None, _ShownOn(bar))

    def tell(self) -> Results:
        """The other acts, by rank 0 alone.

        Raises:
            ChildError: a job failed where nothing should have killed it.
        """
        self._be_killed()
        self._lose_a_rank()
        self._resume_to_the_end()
        for num_ranks in self._settings.other_ranks:
            self._resume_on(num_ranks)
        self.compare()
        return self.results

    def _begin(self, title: str, total: int | None = None) -> Bar:
        self._num_acts += 1
        return self._bars.begin(f"{self._num_acts} {title}", total or self._settings.steps)

    def _be_killed(self) -> None:
        bar = self._begin("train, save, be killed with all ranks")
        first_step = self._settings.kill_job_at_save * self._settings.save_every
        for _ in range(KILL_ATTEMPTS):
            leg = self._run_leg(bar, JobTrap(first_step, has_checkpoint=bool(self.legs)))
            if leg.first.kill is None or leg.first.kill.hit is Aim.WRITING:
                break

    def _lose_a_rank(self) -> None:
        bar = self._begin(f"resume on {self._num_ranks} ranks, lose one of them")
        first_step = self._settings.kill_rank_at_save * self._settings.save_every
        for _ in range(KILL_ATTEMPTS):
            leg = self._run_leg(bar, RankTrap(self._num_ranks - 1, first_step, has_checkpoint=bool(self.legs)))
            if leg.first.kill is None or leg.first.kill.hit is Aim.STAGING:
                break

    def _resume_to_the_end(self) -> None:
        bar = self._begin(f"resume on {self._num_ranks} ranks to the end")
        leg = JobLeg("resumed", self._workspace.run("resumed"), self._num_ranks)
        self.legs.append(leg)
        self._run(leg, self._workspace.checkpoints, bar, trap=None)

    def _resume_on(self, num_ranks: int) -> None:
        bar = self._begin(f"resume on {num_ranks} rank{'s' * (num_ranks > 1)} to the end")
        name = f"on-{num_ranks}"
        leg = JobLeg(name, self._workspace.run(name), num_ranks)
        self.others.append(leg)
        checkpoint = f"step-{self._settings.dropout_steps:08d}"  # a directory that can be copied like any other
        copied = leg.directory / "checkpoints"
        shutil.copytree(self._workspace.checkpoints / checkpoint, copied / checkpoint)
        self._run(leg, copied, bar, trap=None)

    def _run_leg(self, bar: Bar, trap: JobTrap | RankTrap) -> JobLeg:
        name = f"killed-{len(self.legs) + 1}"
        leg = JobLeg(name, self._workspace.run(name), self._num_ranks)
        self.legs.append(leg)
        self._run(leg, self._workspace.checkpoints, bar, trap)
        return leg

    def _run(self, leg: JobLeg, checkpoints: Path, bar: Bar, trap: JobTrap | RankTrap | None) -> None:
        arguments = ["--config", str(self._workspace.config), "--run-dir", str(leg.directory)]
        arguments += ["--checkpoints", str(checkpoints)]
        log = leg.directory / "log.txt"
        with Job(len(leg.ranks), "stager.demo.ranks.rank", arguments, log) as job:
            killed_in: int | None = None
            num_workers = 0
            for said in job.rank_events():  # after a kill: what the ranks had still said before they died
                leg.note(said)
                if said.rank == 0:
                    _show(bar, said.event)
                if killed_in is not None or trap is None:
                    continue
                if isinstance(said.event, SaveBegun):  # counted now, because they may be gone right after the kill
                    num_workers = num_workers or len(job.workers_alive())
                if (killed_in := trap.sprung_by(leg, said)) is not None:
                    killed_at = time.time()
                    if isinstance(trap, JobTrap):
                        job.kill()
                    else:
                        job.kill_rank(trap.rank)
                    partial = has_partial(checkpoints, killed_in)
            if killed_in is None or trap is None:
                job.wait()
                bar.end(f"step {leg.first.steps[-1].step}" if leg.first.steps else "")
                return
            exit_code = job.exit_code()
            leg.victim = Victim.JOB if isinstance(trap, JobTrap) else Victim.RANK
            if leg.victim is Victim.RANK:
                leg.end = End(exit_code, time.time() - killed_at)
            gone_secs, left = wait_until_gone(job, GONE_WITHIN_SECS)
            leg.first.kill = Kill(
                Aim.WRITING if leg.victim is Victim.JOB else Aim.STAGING,
                killed_in,
                killed_at,
                staged=leg.is_staged(killed_in),
                committed=leg.is_committed(killed_in),
                partial=partial,
                num_workers=num_workers,
                gone_secs=gone_secs,
                left=tuple(left),
            )
            bar.end(f"killed in the save at step {killed_in}")

    def compare(self) -> None:
        """Acts 6 and 7: check everything that the jobs have left behind."""
        settings = self._settings
        losses, final = self.truth / "losses.jsonl", self.truth / "final.pt"
        legs = self.results.legs = [leg.first for leg in self.legs]
        checks = self.results.checks

        bar = self._begin("compare", 2 + len(self.others))
        checks += [check_job_kill(self.legs), check_rank_kill(self.legs)]
        checks += [check_workers_gone(legs), check_resumes(legs), check_losses(losses, legs, settings.steps)]
        bar.advance()
        checks.append(check_final_state(final, legs[-1].directory / "final.pt"))
        bar.advance()
        for leg in self.others:
            first_step = settings.dropout_steps + 1
            checks.append(check_close(losses, leg, self._num_ranks, first_step, settings.steps, settings.tolerance))
            bar.advance()
        bar.end("")

        bar = self._begin("load with stock dcp.load", 1)
        checks.append(check_stock_load(final, self._workspace.checkpoints / f"step-{settings.steps:08d}"))
        bar.advance()
        bar.end("")


class _ShownOn:
    """Shows on a bar what happens in this process."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar

    def send(self, event: Event) -> None:
        _show(self._bar, event)


class _Silent:
    """For the ranks that only train along."""

    def send(self, event: Event) -> None:
        pass


def train_along(config: RanksConfig) -> None:
    """Act 1 on a rank other than 0."""
    train_rank(config, Path(), None, _Silent())


def _show(bar: Bar, event: Event) -> None:
    match event:
        case Resumed():
            bar.reach(event.step)
            bar.say(f"from step {event.step}")
        case StepDone():
            bar.reach(event.step)
        case SaveCommitted():
            bar.say(f"step {event.step} committed")
