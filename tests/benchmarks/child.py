"""One peer on one case in a process of its own: ``python -m tests.benchmarks.child JOB``.

Records are appended to a file line by line, so that what was measured survives whatever ends this process. stdout and
stderr belong to the peer.
"""

from __future__ import annotations

import ctypes
import logging
import os
import random
import resource
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tests.benchmarks.cases import CASES, Case, Kind
from tests.benchmarks.job import Job
from tests.benchmarks.peers import PEERS
from tests.benchmarks.records import Failure, Finished, Outcome, Record, State, to_line
from tests.benchmarks.workload import Workload

_MESSAGE_CHARS = 600
_PR_SET_PDEATHSIG = 1
Report = Callable[[Record], None]


def main() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # never outlives the benchmark, however that ends
    job = Job.from_text(sys.argv[1])
    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)  # the peers' chatter
    with _reporting(job.records) as report:
        try:
            _run(job, report)
        except Exception as error:  # noqa: BLE001  (the edge of the process: a peer that fails is a row that says how)
            traceback.print_exc()
            report(failure_of(job, error))
        else:
            report(Finished())


@contextmanager
def _reporting(path: str) -> Iterator[Report]:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        yield lambda record: _write(fd, to_line(record))
    finally:
        os.close(fd)


def _write(fd: int, line: str) -> None:
    os.write(fd, line.encode())


def _run(job: Job, report: Report) -> None:
    case = CASES[job.case]
    if case.nofile is not None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (case.nofile, case.nofile))
    torch.manual_seed(job.seed)
    random.seed(job.seed)
    _RUNNERS[case.kind]()(job, _build(case, job.scale, report), report)


def _build(case: Case, scale: float, report: Report) -> Workload:
    workload = case.make(scale)
    tensors = workload.tensors()
    report(State(sum(tensor.nbytes for tensor in tensors), len(tensors)))
    return workload


def failure_of(job: Job, error: Exception) -> Failure:
    wanted = {CASES[job.case].needs, PEERS[job.peer].needs} - {None}
    if isinstance(error, ModuleNotFoundError) and error.name in wanted:
        return Failure(Outcome.NOT_INSTALLED.value, f"{error.name} is not installed")
    return Failure(Outcome.FAILED.value, _describe(error))


def _describe(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}".strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    # A remote traceback ends with what happened; an ordinary message begins with it.
    short = lines[0] if len(lines) == 1 else f"{lines[0]} ... {lines[-1]}"
    return short[:_MESSAGE_CHARS]


def _saves() -> Any:
    from tests.benchmarks.saves import run

    return run


def _training() -> Any:
    from tests.benchmarks.training import run

    return run


def _soak() -> Any:
    from tests.benchmarks.soak import run

    return run


_RUNNERS = {Kind.SAVES: _saves, Kind.LOOP: _training, Kind.SOAK: _soak}

if __name__ == "__main__":
    main()
