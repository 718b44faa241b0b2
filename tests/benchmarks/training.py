"""The training loop: what a save costs it, against the same loop without.

Stretches with one save each and stretches without alternate (A B, then B A, and so on), so that drift falls on both.
Before the next stretch the save is stored and everything synced, outside the times; a save that was not stored when its
stretch was over is marked, for its remaining cost is in no figure.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stager.config.host import usable_cores
from tests.benchmarks.job import Job
from tests.benchmarks.limits import LimitMeter
from tests.benchmarks.peers import PEERS, Pending, Session
from tests.benchmarks.records import Record, Stretch
from tests.benchmarks.saves import open_session, settle
from tests.benchmarks.workload import Workload

_BATCH = 64
_WARMUP_SAVES = 2  # every buffer is in place, every process is up

Report = Callable[[Record], None]


@dataclass(slots=True)
class _Times:
    total_secs: float = 0.0
    compute_secs: float = 0.0
    blocked_secs: float = 0.0


class _Trainer:
    def __init__(self, workload: Workload, session: Session) -> None:
        self._model: Any = workload.objects["model"]
        self._optimizer = workload.optimizers[0]
        self._session = session
        self._inputs = torch.randn(_BATCH, next(self._model.parameters()).shape[1])

    def step(self, times: _Times) -> None:
        started = time.perf_counter()
        self._model(self._inputs).square().mean().backward()
        times.compute_secs += time.perf_counter() - started
        waiting = time.perf_counter()
        with self._session.around_step():
            times.blocked_secs += time.perf_counter() - waiting
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def stretch(self, steps: int, save_as: int | None) -> tuple[_Times, Pending | None, bool]:
        """``steps`` steps; a save before the first one, if a number for it is given."""
        times, pending = _Times(), None
        started = time.perf_counter()
        if save_as is not None:
            pending = self._session.save(save_as)
            times.blocked_secs = time.perf_counter() - started
        for _ in range(steps):
            self.step(times)
        in_time = pending is None or pending.stored()
        times.total_secs = time.perf_counter() - started
        return times, pending, in_time


def run(job: Job, workload: Workload, report: Report) -> None:
    torch.set_num_threads(1)
    directory = Path(job.directory)
    meter = LimitMeter(workload.tensors(), directory, usable_cores())
    session = open_session(PEERS[job.peer], workload, job, report)
    trainer = _Trainer(workload, session)
    for step in range(_WARMUP_SAVES):
        _finish(trainer.stretch(1, step)[1], directory, step)
    for pair in range(job.pairs):
        report(_measure_pair(job, trainer, meter, directory, pair))
    session.close()
    meter.close()


def _measure_pair(job: Job, trainer: _Trainer, meter: LimitMeter, directory: Path, pair: int) -> Stretch:
    step = _WARMUP_SAVES + pair
    memcpy_secs, memcpy_threads_secs = meter.memcpy()
    without = trainer.stretch(job.stretch_steps, None)[0] if pair % 2 else None
    saving, pending, in_time = trainer.stretch(job.stretch_steps, step)
    _finish(pending, directory, step)
    without = without or trainer.stretch(job.stretch_steps, None)[0]
    return Stretch(
        round=job.round,
        pair=pair,
        num_steps=job.stretch_steps,
        without_secs=without.total_secs,
        with_secs=saving.total_secs,
        blocked_secs=saving.blocked_secs,
        compute_secs=without.compute_secs / job.stretch_steps,
        stored_in_time=in_time,
        memcpy_secs=memcpy_secs,
        memcpy_threads_secs=memcpy_threads_secs,
    )


def _finish(pending: Pending | None, directory: Path, step: int) -> None:
    assert pending is not None
    pending.wait_staged()
    pending.wait_stored()
    settle(directory, step)
