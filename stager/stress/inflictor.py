"""Carrying out the faults of one run: arm the points, send the signals, fill the disk, let stopped processes go on."""

from __future__ import annotations

import os
import shutil
import signal
import time
from dataclasses import dataclass, field

import psutil

from stager.stress.diary import BegunEntry, Diary, FailedEntry, UpEntry
from stager.stress.disk import SmallDisk
from stager.stress.episode import RunPlan
from stager.stress.fault_kinds import Fault, FullDisk, PointFault, Pressure, RemovePartial, SignalFault
from stager.stress.forks import ForkServer
from stager.stress.processes import send, state_of
from stager.workers.checkpoint.directory.run_directory import partial_names


@dataclass
class Fired:
    """A fault that occurred.

    Attributes:
        fault: the fault.
        time: when it occurred, in seconds since the epoch; for points a few milliseconds late.
        whom: "trainer", "worker", "disk" ..., as far as it is known.
        over: when its effect ended; None if it has not ended, or had no duration.
    """

    fault: Fault
    time: float
    whom: str
    over: float | None = None


@dataclass
class Inflictor:
    """Carries out the faults of one run.

    Args:
        server: whose children are the victims.
        plan: of the run.
        faults_dir: the directory of armed points, empty.
        directory: of the checkpoints.
        disk: the small disk it is on, if there is one.
        log: of what is started here.
    """

    server: ForkServer
    plan: RunPlan
    faults_dir: str
    directory: str
    disk: SmallDisk | None
    log: str
    fired: list[Fired] = field(default_factory=list)
    _waiting: list[Fault] = field(default_factory=list)
    _due: dict[int, float] = field(default_factory=dict)  # index in plan.faults -> time.monotonic() of a signal
    _stopped: dict[int, float] = field(default_factory=dict)  # pid -> time.monotonic() when it was seen stopped
    _num_begun: int = 0
    _is_up: bool = False

    def arm(self) -> None:
        """Arm the points. Call it before the trainer starts."""
        for fault in self.plan.faults:
            if isinstance(fault, PointFault):
                path = os.path.join(self.faults_dir, fault.point)
                with open(f"{path}.tmp", "w", encoding="utf-8") as file:
                    file.write(f"{fault.action} {fault.detail} after={fault.after}")
                os.rename(f"{path}.tmp", path)
        self._waiting = [fault for fault in self.plan.faults if fault.kind != "damage"]

    def disarm(self) -> None:
        """Disarm the points, so that no further fault occurs."""
        self._note_points()
        for name in os.listdir(self.faults_dir):
            os.unlink(os.path.join(self.faults_dir, name))
        if self.disk is not None:
            self._relieve_disk()
        self._waiting = []

    def act(self, diary: Diary, trainer: int | None) -> None:
        """Again and again while the run lives. ``trainer``: its pid; None: it has ended."""
        for entry in diary.read():
            self._is_up = self._is_up or isinstance(entry, UpEntry)
            self._num_begun += isinstance(entry, BegunEntry)
            if isinstance(entry, FailedEntry):
                self._relieve_disk()
        self._note_points()
        for fault in list(self._waiting):
            if isinstance(fault, SignalFault):
                self._maybe_signal(fault, trainer)
            elif isinstance(fault, RemovePartial) and self._num_begun >= fault.save:
                self._maybe_remove(fault)
            elif isinstance(fault, (FullDisk, Pressure)) and self._num_begun >= fault.save:
                self._burden(fault)
        for fired in self.fired:
            if isinstance(fired.fault, FullDisk) and time.time() > fired.time + fired.fault.secs:
                self._relieve_disk()
        if any(_stops(fired.fault) for fired in self.fired):
            self._help_the_stopped(trainer)

    # -- each kind ----------------------------------------------------------------------------------------------

    def _note_points(self) -> None:
        for fault in list(self._waiting):
            if isinstance(fault, PointFault) and not os.path.exists(os.path.join(self.faults_dir, fault.point)):
                self._came_about(fault, "trainer" if fault.of_trainer else "worker")

    def _maybe_signal(self, fault: SignalFault, trainer: int | None) -> None:
        if not self._is_up or self._num_begun < fault.save:
            return
        key = self.plan.faults.index(fault)
        due = self._due.setdefault(key, time.monotonic() + fault.delay_secs)
        if time.monotonic() < due:
            return
        workers = sorted(p.pid for p in self.server.alive() if p.pid != trainer and _is_worker(p))
        victims = {"trainer": [], "worker": workers, "any": workers}[fault.target]
        if trainer is not None and fault.target != "worker":
            victims = [trainer, *victims]
        if not victims:
            self._waiting.remove(fault)
            return
        victim = victims[fault.pick % len(victims)]
        when = time.time()
        if send(victim, getattr(signal, fault.signal)):
            self._came_about(fault, "trainer" if victim == trainer else "worker", when)

    def _maybe_remove(self, fault: RemovePartial) -> None:
        """It goes in one step: removed file by file, it could become a checkpoint meanwhile, and lose the rest as one."""
        for name in partial_names(self.directory):
            when = time.time()
            aside = os.path.join(os.path.dirname(self.directory), f"removed-{when}")
            try:
                os.rename(os.path.join(self.directory, name), aside)
            except FileNotFoundError:  # committed
                continue
            shutil.rmtree(aside, ignore_errors=True)  # who is writing there may go on for a moment
            self._came_about(fault, "disk", when)
            return

    def _burden(self, fault: FullDisk | Pressure) -> None:
        when = time.time()
        if isinstance(fault, Pressure):
            nbytes = min(fault.nbytes, psutil.virtual_memory().available // 10)
            self.server.fork("hog", self.log, {"nbytes": nbytes, "secs": fault.secs})
            self._came_about(fault, "memory", when)
        elif self.disk is not None:
            self.disk.fill(fault.free_bytes)
            self._came_about(fault, "disk", when)

    def _relieve_disk(self) -> None:
        for fired in self.fired:
            if isinstance(fired.fault, FullDisk) and fired.over is None and self.disk is not None:
                self.disk.relieve()
                fired.over = time.time()

    def _came_about(self, fault: Fault, whom: str, when: float | None = None) -> None:
        self._waiting.remove(fault)
        self.fired.append(Fired(fault, time.time() if when is None else when, whom))

    # -- the stopped --------------------------------------------------------------------------------------------

    def _help_the_stopped(self, trainer: int | None) -> None:
        """Nobody but us can help a stopped trainer, or a stopped worker whose trainer is gone. The pool has to deal with any
        other."""
        for process in self.server.alive():
            pid = process.pid
            if state_of(pid) != "T":
                self._stopped.pop(pid, None)
                continue
            if trainer is not None and pid != trainer:
                continue
            fired = next(f for f in self.fired if _stops(f.fault))
            fault = fired.fault
            assert isinstance(fault, (PointFault, SignalFault))
            since = self._stopped.setdefault(pid, time.monotonic())
            if time.monotonic() >= since + fault.pause_secs:
                send(pid, signal.SIGCONT if fault.relief == "continue" else signal.SIGKILL)
                fired.over = time.time()
                if fault.relief == "kill":
                    fired.whom = "trainer" if pid == trainer else "worker"


def _stops(fault: Fault) -> bool:
    return isinstance(fault, (PointFault, SignalFault)) and fault.stops


def _is_worker(process: psutil.Process) -> bool:
    try:
        return any("stager.workers.pool.worker_main" in part for part in process.cmdline())
    except psutil.Error:
        return False
