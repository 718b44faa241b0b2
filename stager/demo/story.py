"""The demo: a list of acts, and what they show.  One rank is a job of one.

train without interruption    by the ranks that the user has started: the truth that everything is compared with
train, save, be killed        in a job of as many ranks: once the last rank while the snapshot is taken, once all of them
                              while it is written; each time from the newest valid checkpoint on
resume to the end             after the last kill
resume on other numbers       from a copy of one of these checkpoints, to the end
compare                       losses and final state, bit for bit; on other numbers of ranks within a tolerance
load with stock dcp.load      the last checkpoint, in a process that never imports stager
measure the time lost         per save: stager, torch.save, dcp.async_save in turns
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from stager.demo.bars import Bar, Bars
from stager.demo.checks import (
    check_close,
    check_final_state,
    check_kills,
    check_losses,
    check_resumes,
    check_stock_load,
    check_workers_gone,
)
from stager.demo.config import DemoConfig
from stager.demo.events import Event, MeasuredSave, RankEvent, Stretch
from stager.demo.job import Job
from stager.demo.leg import Aim, Leg, Trap, ranks_text
from stager.demo.results import Measurement, Results
from stager.demo.runner import LegRunner, show
from stager.demo.sharded import train_rank
from stager.demo.workspace import Workspace

KILL_ATTEMPTS = 3  # a save may get further before the signal arrives; then another save is aimed at
NUM_METHODS = 3
KILLED = {Aim.STAGING: "while a snapshot is taken", Aim.WRITING: "while a save is written"}


@dataclass(frozen=True)
class Act:
    """One act: its title, its units of work, and what plays it."""

    title: str
    num_units: int
    play: Callable[[Bar], None]


class Story:
    """Plays the acts in order and keeps what was seen.

    Args:
        num_ranks: ranks that the user has started, of which this process is rank 0, and of the jobs that are killed.
    """

    def __init__(self, config: DemoConfig, num_ranks: int, workspace: Workspace, bars: Bars) -> None:
        self._config = config
        self._settings = config.demo
        self._num_ranks = num_ranks
        self._workspace = workspace
        self._bars = bars
        self.results = Results(Leg("uninterrupted", workspace.run("uninterrupted"), num_ranks))

    def tell(self) -> Results:
        """Play all acts.

        Raises:
            JobError: a job failed where nothing should have killed it.
        """
        for number, act in enumerate(self.acts(), start=1):
            bar = self._bars.begin(f"{number} {act.title}", act.num_units)
            act.play(bar)
            bar.end()
        return self.results

    def acts(self) -> list[Act]:
        """Return the acts that this configuration asks for."""
        settings, on_ranks = self._settings, f" on {self._num_ranks} ranks" if self._num_ranks > 1 else ""
        acts = [Act(f"train{on_ranks} without interruption", settings.steps, self._train_here)]
        verb = "train and save"
        for aim, save in settings.kills:
            victim = "one rank" if aim is Aim.STAGING else "all ranks"
            title = f"{verb}; SIGKILL{f' of {victim}' * (self._num_ranks > 1)} {KILLED[aim]}"
            acts.append(Act(title, settings.steps, partial(self._be_killed, aim, save * settings.save_every)))
            verb = "resume"
        acts.append(Act(f"resume{on_ranks} to the end", settings.steps, self._resume))
        for num_ranks in settings.other_ranks:
            title = f"resume on {ranks_text(num_ranks)} to the end"
            acts.append(Act(title, settings.steps, partial(self._resume_on, num_ranks)))
        acts.append(Act("compare", 2 + len(settings.other_ranks), self.compare))
        acts.append(Act("load with stock dcp.load", 1, self.load_with_stock))
        if settings.measure_saves:
            acts.append(Act("measure the time lost", settings.measure_saves * NUM_METHODS, self._measure))
        return acts

    def _train_here(self, bar: Bar) -> None:
        def note(event: Event) -> None:
            self.results.truth.note(RankEvent(0, event))
            show(bar, event)

        # The other ranks that the user has started train along: see run.py.
        train_rank(self._config, self._num_ranks > 1, self.results.truth.directory, None, note)

    def _be_killed(self, aim: Aim, first_step: int, bar: Bar) -> None:
        for _ in range(KILL_ATTEMPTS):
            trap = Trap(aim, first_step, has_checkpoint=bool(self.results.legs))
            leg = self._new_leg(f"killed-{len(self.results.legs) + 1}", self._num_ranks, self.results.legs)
            with self._job(leg, self._workspace.checkpoints) as job:
                LegRunner(leg, self._workspace.checkpoints, bar).run_to_kill(job, trap)
            if leg.kill is None or leg.kill.hit is aim:
                return

    def _resume(self, bar: Bar) -> None:
        leg = self._new_leg("resumed", self._num_ranks, self.results.legs)
        with self._job(leg, self._workspace.checkpoints) as job:
            LegRunner(leg, self._workspace.checkpoints, bar).run_to_end(job)

    def _resume_on(self, num_ranks: int, bar: Bar) -> None:
        leg = self._new_leg(f"on-{num_ranks}", num_ranks, self.results.others)
        copied = leg.directory / "checkpoints"
        self._workspace.copy_here(f"step-{self._settings.last_dropout_step:08d}", copied)
        with self._job(leg, str(copied)) as job:
            LegRunner(leg, str(copied), bar).run_to_end(job)

    def _new_leg(self, name: str, num_ranks: int, legs: list[Leg]) -> Leg:
        legs.append(Leg(name, self._workspace.run(name), num_ranks))
        return legs[-1]

    def _job(self, leg: Leg, checkpoints: str) -> Job:
        arguments = ["--config", str(self._workspace.config), "--run-dir", str(leg.directory)]
        arguments += ["--checkpoints", checkpoints]
        log = leg.directory / "log.txt"
        return Job("stager.demo.rank", arguments, log, leg.num_ranks, torchrun=self._num_ranks > 1)

    def compare(self, bar: Bar) -> None:
        """Check everything that the jobs have left behind."""
        settings, results, truth = self._settings, self.results, self.results.truth
        results.checks += [check_kills(results.legs), check_workers_gone(results.legs), check_resumes(results.legs)]
        results.checks.append(check_losses(truth, results.legs, settings.steps))
        bar.advance()
        results.checks.append(check_final_state(truth.final, results.legs[-1].final))
        bar.advance()
        for leg in results.others:
            steps = range(settings.last_dropout_step + 1, settings.steps + 1)
            results.checks.append(check_close(truth, leg, steps, settings.tolerance))
            bar.advance()

    def load_with_stock(self, bar: Bar) -> None:
        """Check that stock PyTorch reads the last checkpoint."""
        name = f"step-{self._settings.steps:08d}"
        last = Path(self._workspace.checkpoints, name)
        if self._workspace.store:  # stock PyTorch reads directories
            last = self._workspace.copy_here(name, self._workspace.run("stock"))
        self.results.checks.append(check_stock_load(self.results.truth.final, last))
        bar.advance()

    def _measure(self, bar: Bar) -> None:
        samples: list[MeasuredSave] = []
        stretches: list[Stretch] = []
        arguments = ["--config", str(self._workspace.config), "--directory", str(self._workspace.measured)]
        with Job("stager.demo.measure", arguments, self._workspace.run("measured") / "log.txt") as job:
            for said in job.events():
                if isinstance(said.event, Stretch):
                    stretches.append(said.event)
                elif isinstance(said.event, MeasuredSave):
                    samples.append(said.event)
                    bar.advance()
                    bar.say(said.event.method)
            job.wait()
        self.results.measurement = Measurement.of(samples, stretches)
