"""Cases that are one state: first and later saves, loading, the trainer's speed meanwhile, descriptors, memory."""

from __future__ import annotations

import gc
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch

from stager.config.host import usable_cores
from tests.benchmarks.footprint import num_fds, tree_pss_bytes
from tests.benchmarks.job import Job
from tests.benchmarks.limits import LimitMeter
from tests.benchmarks.peers import PEERS, Peer, Session
from tests.benchmarks.records import Descriptors, Limits, Load, Opened, Ready, Record, Save, Speed
from tests.benchmarks.workload import Workload

Report = Callable[[Record], None]

_LEAST_LATER_SAVES = 2
_WATCHED_SAVES = 4  # enough for every buffer to be in use once, and for the first to be used again
_SPEED_PAIRS = 2
_MATRIX = 128  # three of them fit the level 2 cache
_POLL_EVERY = 16


def run(job: Job, workload: Workload, report: Report) -> None:
    if job.measure == "memory":
        _run_watched(job, workload, report)
    else:
        _run_timed(job, workload, report)


def _run_watched(job: Job, workload: Workload, report: Report) -> None:
    """The parent reads the memory of the tree from ``Ready`` on. Each save is stored before the next, for every peer."""
    gc.collect()
    report(Ready(tree_pss_bytes(os.getpid())))
    session = PEERS[job.peer].open(workload, Path(job.directory))
    session.warm_up()
    for step in range(_WATCHED_SAVES):
        pending = session.save(step)
        pending.wait_staged()
        pending.wait_stored()
        del pending
        settle(Path(job.directory), step)
    session.close()


def _run_timed(job: Job, workload: Workload, report: Report) -> None:
    peer, directory = PEERS[job.peer], Path(job.directory)
    meter = LimitMeter(workload.tensors(), directory, usable_cores())
    fds = num_fds()
    limits = meter.measure()
    session = open_session(peer, workload, job, report)
    step = _time_saves(job, workload, session, meter, limits, report)
    started = time.perf_counter()
    session.load(step)
    report(Load(job.round, time.perf_counter() - started))
    report(Descriptors(job.round, fds, num_fds()))
    meter.close()
    if not peer.blocking:
        _measure_speed(job, workload, session, step, report)
    session.close()


def open_session(peer: Peer, workload: Workload, job: Job, report: Report) -> Session:
    started = time.perf_counter()
    session = peer.open(workload, Path(job.directory))
    opened = time.perf_counter()
    warmed = session.warm_up()
    report(Opened(job.round, opened - started, time.perf_counter() - opened if warmed else None))
    return session


def _time_saves(
    job: Job, workload: Workload, session: Session, meter: LimitMeter, limits: Limits, report: Report
) -> int:
    """Returns the last step. The first save follows right after opening: its limits were measured before."""
    begun = time.perf_counter()
    for step in range(job.saves + 1):
        if step:
            if step > _LEAST_LATER_SAVES and time.perf_counter() - begun > job.cap_secs:
                return step - 1
            workload.mutate()
            limits = meter.measure()
        report(_time_save(job.round, step, session, limits))
        settle(Path(job.directory), step)
    return job.saves


def time_save(session: Session, step: int) -> tuple[float, float, float]:
    """Save once; return the seconds until the call returned, until the state was staged, and until it was stored."""
    started = time.perf_counter()
    pending = session.save(step)
    blocked = time.perf_counter() - started
    pending.wait_staged()
    staged = time.perf_counter() - started
    pending.wait_stored()
    return blocked, staged, time.perf_counter() - started


def _time_save(round_: int, step: int, session: Session, limits: Limits) -> Save:
    return Save(round_, step, *time_save(session, step), limits)


def settle(directory: Path, step: int) -> None:
    """Only the checkpoint of ``step`` stays; nothing that a peer left unwritten disturbs what is measured next."""
    for path in directory.glob("step-*"):
        if int(path.name[5:13]) != step:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
    os.sync()


# -- the trainer's speed -----------------------------------------------------------------------------------------


def _measure_speed(job: Job, workload: Workload, session: Session, step: int, report: Report) -> None:
    """Alone, while a staged save is being stored, alone again."""
    torch.set_num_threads(1)
    loop = _Loop()
    loop.run_for(job.alone_secs)
    for _ in range(_SPEED_PAIRS):
        step += 1
        before = loop.run_for(job.alone_secs)
        workload.mutate()
        pending = session.save(step)
        pending.wait_staged()
        started = time.perf_counter()
        saving = loop.run_until(pending.stored)
        in_flight = time.perf_counter() - started
        pending.wait_stored()
        settle(Path(job.directory), step)
        after = loop.run_for(job.alone_secs)
        report(Speed(job.round, (before + after) / 2, saving, in_flight))


class _Loop:
    """Small products of matrices that stay in the cache; iterations per second."""

    def __init__(self) -> None:
        self._a, self._b, self._c = (torch.rand(_MATRIX, _MATRIX) for _ in range(3))

    def run_for(self, seconds: float) -> float:
        end = time.perf_counter() + seconds
        return self.run_until(lambda: time.perf_counter() >= end)

    def run_until(self, over: Callable[[], bool]) -> float:
        count = 0
        started = time.perf_counter()
        while not over():
            for _ in range(_POLL_EVERY):
                torch.mm(self._a, self._b, out=self._c)
            count += _POLL_EVERY
        return count / (time.perf_counter() - started)
