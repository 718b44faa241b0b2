"""Thousands of saves of a small state: memory and descriptors stay where they were after twenty."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from pathlib import Path

from tests.benchmarks.footprint import num_fds, pss_bytes, tree
from tests.benchmarks.job import Job
from tests.benchmarks.peers import PEERS
from tests.benchmarks.records import Record, SoakPoint
from tests.benchmarks.saves import open_session, settle
from tests.benchmarks.workload import Workload

FIRST_POINT = 20
_POINTS = 10
_SETTLE_EVERY = 20


def run(job: Job, workload: Workload, report: Callable[[Record], None]) -> None:
    session = open_session(PEERS[job.peer], workload, job, report)
    every = max(1, job.soak_saves // _POINTS)
    started = time.perf_counter()
    for step in range(job.soak_saves):
        pending = session.save(step)
        pending.wait_staged()
        workload.mutate()
        pending.wait_stored()
        del pending
        if step % _SETTLE_EVERY == 0:
            settle(Path(job.directory), step)
        saves = step + 1
        if saves == FIRST_POINT or saves % every == 0 or saves == job.soak_saves:
            report(_read(saves, started))
    session.close()


def _read(saves: int, started: float) -> SoakPoint:
    gc.collect()
    pids = tree(os.getpid())
    return SoakPoint(
        saves=saves,
        pss_bytes=sum(map(pss_bytes, pids)),
        trainer_pss_bytes=pss_bytes(os.getpid()),
        trainer_fds=num_fds(),
        all_fds=sum(map(num_fds, pids)),
        num_processes=len(pids),
        elapsed_secs=time.perf_counter() - started,
    )
