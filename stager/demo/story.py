"""The demo: six acts, each a child process of its own, and what they show.

1  train without interruption                     the truth that everything is compared with
2  train again, saving; be killed during a save   once while the snapshot is taken, once while it is written
3  resume from the newest valid checkpoint        after each kill; the last time to the end
4  compare losses and final state                 bit for bit
5  load the last checkpoint with stock dcp.load   in a process that never imports stager
6  measure the time the loop loses per save       stager, torch.save, dcp.async_save in turns
"""

from __future__ import annotations

import importlib.util
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from stager.demo.bars import Bar, Bars
from stager.demo.checks import (
    GONE_WITHIN_SECS,
    check_final_state,
    check_kills,
    check_losses,
    check_resumes,
    check_stock_load,
    check_workers_gone,
)
from stager.demo.child import Child, wait_until_gone
from stager.demo.config import DemoConfig
from stager.demo.events import MeasuredSave, Resumed, SaveCommitted, StepDone, Stretch
from stager.demo.leg import Aim, Kill, Leg, Trap, has_partial
from stager.demo.report import print_report, write_results
from stager.demo.results import Measurement, Results
from stager.demo.workspace import Workspace
from stager.workers.errors import UsageError

KILL_ATTEMPTS = 3  # a save may get further before the signal arrives; then another one is aimed at
NUM_METHODS = 3


class Story:
    """Plays the acts in order and keeps what was seen."""

    def __init__(self, config: DemoConfig, workspace: Workspace, bars: Bars) -> None:
        self._settings = config.demo
        self._workspace = workspace
        self._bars = bars
        self.results = Results()

    def tell(self) -> Results:
        """Play all acts.

        Raises:
            ChildError: a child failed where nothing should have killed it.
        """
        self._train_uninterrupted()
        self._train_until_killed()
        self._resume_to_the_end()
        self.compare()
        self._measure()
        return self.results

    def _train_uninterrupted(self) -> None:
        bar = self._bars.begin("1 train without interruption", self._settings.steps)
        directory = self._workspace.run("uninterrupted")
        arguments = ["--config", str(self._workspace.config), "--run-dir", str(directory)]
        with Child("stager.demo.train", arguments, directory / "log.txt") as child:
            for event in child.events():
                if isinstance(event, StepDone):
                    bar.advance()
                    bar.say(f"loss {event.loss:.3f}")
            child.wait()

    def _train_until_killed(self) -> None:
        bar = self._bars.begin("2 train, save, be killed", self._settings.steps)
        targets = {
            Aim.STAGING: self._settings.kill_staging_at_save,
            Aim.WRITING: self._settings.kill_writing_at_save,
        }
        for aim, save in targets.items():
            for _ in range(KILL_ATTEMPTS):
                trap = Trap(aim, save * self._settings.save_every, has_checkpoint=bool(self.results.legs))
                leg = self._run_leg(f"killed-{len(self.results.legs) + 1}", bar, trap)
                if leg.kill is None or leg.kill.hit is aim:
                    break
        bar.end(f"killed {len(self.results.legs)} times")

    def _resume_to_the_end(self) -> None:
        bar = self._bars.begin("3 resume to the end", self._settings.steps)
        self._run_leg("resumed", bar, trap=None)

    def _run_leg(self, name: str, bar: Bar, trap: Trap | None) -> Leg:
        leg = Leg(name, self._workspace.run(name))
        self.results.legs.append(leg)
        arguments = ["--config", str(self._workspace.config), "--run-dir", str(leg.directory)]
        arguments += ["--checkpoints", str(self._workspace.checkpoints)]
        with Child("stager.demo.train", arguments, leg.directory / "log.txt") as child:
            killed_in: int | None = None
            num_workers = 0
            for event in child.events():  # after a kill: what the trainer had still said before it died
                leg.note(event)
                _show(bar, event)
                if killed_in is not None:
                    continue
                # Counted while the trainer lives, because they may be gone right after the kill.
                num_workers = num_workers or len(child.workers_alive())
                if trap is not None and (killed_in := trap.sprung_by(leg, event)) is not None:
                    killed_at = time.time()
                    child.kill()
                    partial = has_partial(self._workspace.checkpoints, killed_in)
            if killed_in is None or trap is None:
                child.wait()
            else:
                gone_secs, left = wait_until_gone(child, GONE_WITHIN_SECS)
                leg.kill = Kill(
                    trap.aim,
                    killed_in,
                    killed_at,
                    staged=killed_in in leg.staged,
                    committed=killed_in in leg.committed,
                    partial=partial,
                    num_workers=num_workers,
                    gone_secs=gone_secs,
                    left=tuple(left),
                )
                bar.say(f"killed in the save at step {killed_in}")
        return leg

    def compare(self) -> None:
        """Acts 4 and 5: check everything that the children have left behind."""
        bar = self._bars.begin("4 compare bit for bit", 2)
        legs = self.results.legs
        truth = self._workspace.run("uninterrupted")
        self.results.checks += [check_kills(legs, len(Aim)), check_workers_gone(legs), check_resumes(legs)]
        self.results.checks.append(check_losses(truth / "losses.jsonl", legs, self._settings.steps))
        bar.advance()
        self.results.checks.append(check_final_state(truth / "final.pt", legs[-1].directory / "final.pt"))
        bar.advance()

        bar = self._bars.begin("5 load with stock dcp.load", 1)
        last = self._workspace.checkpoints / f"step-{self._settings.steps:08d}"
        self.results.checks.append(check_stock_load(truth / "final.pt", last))
        bar.advance()

    def _measure(self) -> None:
        total = self._settings.measure_saves * NUM_METHODS
        bar = self._bars.begin("6 measure the time lost", total)
        samples: list[MeasuredSave] = []
        stretches: list[Stretch] = []
        arguments = ["--config", str(self._workspace.config), "--directory", str(self._workspace.measured)]
        with Child("stager.demo.measure", arguments, self._workspace.run("measured") / "log.txt") as child:
            for event in child.events():
                if isinstance(event, Stretch):
                    stretches.append(event)
                elif isinstance(event, MeasuredSave):
                    samples.append(event)
                    bar.advance()
                    bar.say(event.method)
            child.wait()
        bar.end("")
        self.results.measurement = Measurement.of(samples, stretches)


def _show(bar: Bar, event: object) -> None:
    match event:
        case Resumed():
            bar.reach(event.step)
            bar.say(f"from step {event.step}")
        case StepDone():
            bar.reach(event.step)
        case SaveCommitted():
            bar.say(f"step {event.step} committed")


def run_demo(config: DemoConfig, out_dir: Path, console: Console, as_json: bool = False) -> int:
    """Run the demo and print what it showed.

    Args:
        config: what to train and how to save; see :class:`DemoConfig`.
        out_dir: where checkpoints, the chart ``demo.png`` and ``results.json`` go: an empty directory, a new one, or
            that of an earlier demo, which is cleared.
        console: where progress and the tables go.
        as_json: print ``results.json`` on ``console`` and nothing else; progress goes to stderr.

    Returns:
        0: everything was shown; 1: something was not, and the table says what.

    Raises:
        UsageError: matplotlib is not installed, or ``out_dir`` holds something else.
        StorageError: ``out_dir`` has too little free space.
        ChildError: a child process failed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("the demo draws its chart with matplotlib, which is not installed: pip install 'stager[demo]'")
    started = time.monotonic()
    config = config.with_fixed_threads()
    workspace = Workspace.prepare(out_dir, config)
    with Bars(Console(stderr=True) if as_json else console) as bars:
        results = Story(config, workspace, bars).tell()
    results.elapsed_secs = time.monotonic() - started
    return conclude(results, config, workspace, console, as_json)


def conclude(results: Results, config: DemoConfig, workspace: Workspace, console: Console, as_json: bool) -> int:
    """Draw, write and print the results; the exit code.  Large files go, unless they are evidence of a failure."""
    from stager.demo.chart import draw_chart  # late: matplotlib takes a second to import

    draw_chart(results, workspace.chart)
    write_results(results, config, workspace)
    print_report(results, config, workspace, console, as_json)
    if results.ok:
        _tidy(workspace, results.legs)
    return results.exit_code


def _tidy(workspace: Workspace, legs: Sequence[Leg]) -> None:
    for directory in [workspace.run("uninterrupted"), *(leg.directory for leg in legs)]:
        (directory / "final.pt").unlink(missing_ok=True)
    workspace.remove_old_checkpoints()
    shutil.rmtree(workspace.measured, ignore_errors=True)
