"""Playing one episode.

1. reference   hash the state after each step of a run without faults
2. run         damage a checkpoint, arm the faults, start a trainer, act on it until it has ended
3. reap        wait until every process of the run has ended, or kill them
4. check       look at the directory, and judge the run; then the next run
5. finish      run to the last step without faults, clean up, check a last time, and look at what is left in the system
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import psutil

from stager.stress.checker import Expectation, Found, found_from_json
from stager.stress.config import StressSettings
from stager.stress.damage import Damaged, inflict_damage
from stager.stress.diary import BegunEntry, CommittedEntry, Diary, SkippedEntry, StagedEntry
from stager.stress.disk import SmallDisk
from stager.stress.episode import Episode, RunPlan
from stager.stress.fault_kinds import Damage
from stager.stress.forks import ForkServer
from stager.stress.inflictor import Inflictor
from stager.stress.judge import died, may_end_a_recovery, violations_of
from stager.stress.outcomes import outcomes_of
from stager.stress.processes import Patience, dump_and_kill, wait_until_gone
from stager.stress.record import EpisodeResult, RunRecord
from stager.stress.system import Traces

_TICK_SECS = 0.004
_JOB_SECS = 120.0
_DISK_SLACK_BYTES = 8 << 20


class EpisodeError(Exception):
    """The episode cannot be judged, because a process of the conductor failed."""


class Conductor:
    """Plays one episode.

    Args:
        server: forks all processes.
        settings: deadlines.
        faults_dir: ``STAGER_FAULTS`` of the server's children.
        directory: for the files of this episode; made here, removed by the caller.
    """

    def __init__(
        self, server: ForkServer, settings: StressSettings, faults_dir: str, directory: str, episode: Episode
    ) -> None:
        self._server = server
        self._settings = settings
        self._faults_dir = faults_dir
        self._directory = directory
        self._episode = episode
        self._plan = os.path.join(directory, "plan.json")
        self._run_dir = os.path.join(directory, "disk", "checkpoints")
        self._digests: Sequence[str] = ()
        self._required: set[int] = set()
        self._damaged: dict[int, str] = {}
        self._quarantined = False
        self._found = Found()
        self._num_jobs = 0
        self._result = EpisodeResult(episode, directory=directory)

    def play(self) -> EpisodeResult:
        """Play the episode, and return what came of it.

        Raises:
            EpisodeError, ForkServerError.
        """
        started = time.monotonic()
        os.makedirs(self._directory)
        with open(self._plan, "wb") as file:
            file.write(self._episode.to_json())
        traces = Traces.take(self._server.pid)
        disk = self._make_disk()
        try:
            self._digests = self._job("reference", {"plan": self._plan})
            for plan in self._episode.runs:
                self._play_run(plan, disk)
            if not self._result.violations:
                self._finish(disk)
        finally:
            self._kill_all()
            if disk is not None:
                self._keep_evidence(disk)
        self._result.violations += traces.left_behind(self._server.pid, self._settings.shmem_tolerance_bytes)
        self._result.secs = time.monotonic() - started
        return self._result

    # -- runs ---------------------------------------------------------------------------------------------------

    def _play_run(self, plan: RunPlan, disk: SmallDisk | None) -> RunRecord:
        number = self._result.num_runs
        self._result.num_runs += 1
        run = RunRecord(plan, Diary(os.path.join(self._directory, f"run-{number}.diary.jsonl")), self._found)
        run.damaged = self._damage(plan)
        if run.damaged:
            run.before = self._check((), busy=False)
        log = os.path.join(self._directory, f"run-{number}.log")
        inflictor = Inflictor(self._server, plan, self._faults_dir, self._run_dir, disk, log)
        inflictor.arm()
        run.started = time.time()
        arguments = {
            "plan": self._plan,
            "run": asdict(plan),
            "directory": self._run_dir,
            "diary": os.path.join(self._directory, f"run-{number}.diary.jsonl"),
        }
        trainer = self._server.fork("trainer", log, arguments)
        self._watch(run, inflictor, trainer)
        if plan.hurried and run.exitcode is not None:
            self._hurry(run, inflictor)
        self._reap(run, inflictor)
        run.fired = inflictor.fired
        self._judge(run)
        return run

    def _watch(self, run: RunRecord, inflictor: Inflictor, trainer: int) -> None:
        """Carry out faults until the trainer has ended."""
        patience = Patience(self._settings.run_deadline_secs)
        peeked = not run.plan.peek_at or bool(self._damaged)
        while (code := self._server.exitcode(trainer)) is None:
            inflictor.act(run.diary, trainer)
            if not peeked and len(run.diary.steps(BegunEntry)) >= run.plan.peek_at:
                peeked = True
                run.peeks = [
                    f"while it ran: {p}" for p in self._check((), busy=True, inflictor=inflictor, run=run).problems
                ]
            if patience.is_over:
                dump_and_kill(self._server.alive(), os.path.join(self._directory, "hang.txt"))
                break
            self._server.wait(trainer, _TICK_SECS)
        run.exitcode, run.ended = code, time.time()

    def _hurry(self, run: RunRecord, inflictor: Inflictor) -> None:
        """Open the directory for a next run while workers of this one still write: it has to wait for them."""
        patience = Patience(self._settings.run_deadline_secs)
        sweep = self._start_sweep()
        while (code := self._server.exitcode(sweep)) is None and not patience.is_over:
            inflictor.act(run.diary, None)
            self._server.wait(sweep, _TICK_SECS)
        inflictor.act(run.diary, None)
        if code != 0 and not any(may_end_a_recovery(fired.fault) for fired in inflictor.fired):
            run.peeks.append(
                f"opening the directory right after the trainer's end failed with exit code {code}; see sweep.log"
            )

    def _start_sweep(self) -> int:
        arguments = {"directory": self._run_dir, "config": self._episode.config}
        return self._server.fork("sweep", os.path.join(self._directory, "sweep.log"), arguments)

    def _reap(self, run: RunRecord, inflictor: Inflictor) -> None:
        """Wait until the last process of the run has ended, or kill those that are left."""
        patience = Patience(self._settings.gone_deadline_secs)
        while (alive := self._server.alive()) and not patience.is_over:
            inflictor.act(run.diary, None)
            wait_until_gone(self._server, _TICK_SECS * 2)
        run.gone_secs = time.time() - run.ended
        run.left = [_name(process) for process in alive]
        if alive:
            dump_and_kill(alive, os.path.join(self._directory, "left.txt"))
        inflictor.disarm()
        run.diary.read()

    def _judge(self, run: RunRecord) -> None:
        diary = run.diary
        failed = {failure.step for failure in diary.failures}
        self._required -= failed
        self._required |= (diary.steps(StagedEntry) - failed) | diary.steps(CommittedEntry)
        run.found = self._found = self._check(sorted(self._required), busy=False)
        self._required -= set(run.found.missing)  # reported once
        for step in run.found.valid:
            self._damaged.pop(step, None)
        violations = [f"run {self._result.num_runs}: {v}" for v in violations_of(run, self._episode, self._digests)]
        result = self._result
        result.violations += violations
        result.outcomes += outcomes_of(run, bool(violations))
        result.num_saves += sum(isinstance(entry, BegunEntry) for entry in diary.entries)
        result.num_failed += len(failed)
        result.num_skipped += len(diary.steps(SkippedEntry))
        result.num_committed += len(set(run.found.valid) & diary.steps(BegunEntry))

    def _finish(self, disk: SmallDisk | None) -> None:
        """Run to the last step if the last run did not get there; then clean up, and check."""
        last = self._episode.runs[-1]
        calm = RunPlan(until=self._episode.num_steps)
        for _ in range(2):
            if self._reached_the_end():
                break
            run = self._play_run(calm, disk)
            if died(run) and not self._result.violations:
                self._result.violations.append("a run without faults did not reach its last step")
        sweep = self._start_sweep()
        patience = Patience(self._settings.run_deadline_secs)
        while (code := self._server.wait(sweep, _TICK_SECS)) is None and not patience.is_over:
            pass
        if code != 0:
            self._result.violations.append(
                f"opening the directory at the end failed with exit code {code}; see sweep.log"
            )
        wait_until_gone(self._server, self._settings.gone_deadline_secs)
        found = self._check(sorted(self._required), busy=False, partials_allowed=False)
        self._result.violations += [f"at the end: {problem}" for problem in found.problems]
        self._result.violations += [f"at the end: the checkpoint of step {step} is gone" for step in found.missing]
        assert last.until == self._episode.num_steps

    def _reached_the_end(self) -> bool:
        return max(self._found.valid, default=-1) == self._episode.num_steps - 1

    # -- around a run -------------------------------------------------------------------------------------------

    def _damage(self, plan: RunPlan) -> list[Damaged]:
        done = []
        for fault in plan.faults:
            if isinstance(fault, Damage):
                damaged = inflict_damage(self._run_dir, fault, frozenset(self._damaged))
                if damaged is not None:
                    done.append(damaged)
                    self._damaged[damaged.step] = damaged.save_id
                    self._quarantined = self._quarantined or not damaged.save_id
        return done

    def _check(
        self,
        required: Sequence[int],
        *,
        busy: bool,
        partials_allowed: bool = True,
        inflictor: Inflictor | None = None,
        run: RunRecord | None = None,
    ) -> Found:
        expected = Expectation(self._digests, required, self._damaged, partials_allowed, busy, self._quarantined)
        arguments = {"directory": self._run_dir, "expected": asdict(expected)}
        return found_from_json(self._job("check", arguments, inflictor, run))

    def _job(
        self, name: str, arguments: dict[str, Any], inflictor: Inflictor | None = None, run: RunRecord | None = None
    ) -> Any:
        """Do a job in a child of the server, and return its result."""
        self._num_jobs += 1
        result = os.path.join(self._directory, f"{name}-{self._num_jobs}.json")
        log = os.path.join(self._directory, f"{name}.log")
        pid = self._server.fork(name, log, arguments | {"result": result})
        patience = Patience(_JOB_SECS)
        while (code := self._server.wait(pid, _TICK_SECS)) is None and not patience.is_over:
            if inflictor is not None and run is not None:
                inflictor.act(run.diary, None)
        if code != 0:
            raise EpisodeError(f"the job {name} ended with exit code {code}; see {log}")
        with open(result, encoding="utf-8") as file:
            data = json.load(file)
        os.unlink(result)
        return data

    def _make_disk(self) -> SmallDisk | None:
        path = os.path.join(self._directory, "disk")
        os.makedirs(path)
        if not self._episode.small_disk:
            return None
        num_saves = sum(map(self._episode.saves_at, range(self._episode.num_steps)))
        nbytes = self._episode.training.max_nbytes * 2 + (128 << 10)
        return SmallDisk(path, nbytes * (num_saves + 4) + _DISK_SLACK_BYTES)

    def _keep_evidence(self, disk: SmallDisk) -> None:
        """Copy the small disk if there are violations, and unmount it."""
        if self._result.violations:
            shutil.copytree(disk.path, os.path.join(self._directory, "disk-copy"), symlinks=True)
        disk.unmount()

    def _kill_all(self) -> None:
        for process in self._server.alive():
            process.kill()
        wait_until_gone(self._server, 5.0)
        for name in os.listdir(self._faults_dir):
            os.unlink(os.path.join(self._faults_dir, name))


def _name(process: psutil.Process) -> str:
    try:
        return f"process {process.pid} ({process.status()})"
    except psutil.Error:
        return f"process {process.pid}"
