"""Snapshots of tensors on a GPU. Runs where ``torch.cuda.is_available()``; not run on a GPU yet.

Three things per save: how fast the bytes come to the host beside a copy of the same bytes into pinned memory; what the
trainer's stream loses (a chain of kernels with a save in its middle, less the same chain without, by events, the host being
far enough ahead that its own time does not count); and whether what was saved is what the tensors held, while another
stream changes them as soon as it may.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

from tests.benchmarks.footprint import tree
from tests.benchmarks.job import Job
from tests.benchmarks.peers import PEERS, Pending, Session
from tests.benchmarks.records import DeviceSave, Failure, Outcome, Record
from tests.benchmarks.saves import open_session, settle, time_save
from tests.benchmarks.workload import Workload

_CHAIN_SECS = 0.2  # of kernels on each side of the save
_MATRIX = 4096

Report = Callable[[Record], None]


def run(job: Job, workload: Workload, report: Report) -> None:
    if not torch.cuda.is_available():
        report(Failure(Outcome.NOT_POSSIBLE.value, "no CUDA device"))
        return
    directory = Path(job.directory)
    pinned = _PinnedCopy(workload.tensors())
    chain = _Chain()
    session = open_session(PEERS[job.peer], workload, job, report)
    for index in range(job.saves + 1):
        report(_measure(job, index, workload, session, pinned, chain, directory))
    session.close()


def _measure(
    job: Job,
    index: int,
    workload: Workload,
    session: Session,
    pinned: _PinnedCopy,
    chain: _Chain,
    directory: Path,
) -> DeviceSave:
    """Three saves: an idle one for the rate, one inside kernels, one beside a stream that changes the tensors."""
    workload.mutate()
    pinned_secs = pinned.measure()
    step = 3 * index
    blocked, staged = _time_staging(session, step)
    settle(directory, step)
    lost = _time_stream(session, step + 1, chain)
    settle(directory, step + 1)
    contexts = sum(map(_holds_gpu, tree(os.getpid())[1:]))
    correct = _check(workload, session, step + 2)
    settle(directory, step + 2)
    return DeviceSave(job.round, index, pinned_secs, blocked, staged, lost, contexts, correct)


def _time_staging(session: Session, step: int) -> tuple[float, float]:
    torch.cuda.synchronize()
    blocked, staged, _ = time_save(session, step)
    return blocked, staged


def _time_stream(session: Session, step: int, chain: _Chain) -> float:
    without, _ = chain.measure(None)
    with_save, pending = chain.measure(lambda: session.save(step))
    assert pending is not None
    pending.wait_staged()
    pending.wait_stored()
    again, _ = chain.measure(None)
    return with_save - (without + again) / 2


def _check(workload: Workload, session: Session, step: int) -> bool | None:
    """Change the tensors on another stream as soon as the peer allows it; what comes back must be what was there."""
    expected = [tensor.clone() for tensor in workload.tensors()]
    pending = session.save(step)
    other = torch.cuda.Stream()
    with session.around_step():
        pending.wait_staged()
        other.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(other):
            workload.mutate()
    pending.wait_stored()
    torch.cuda.synchronize()
    try:
        session.load(step)
    except NotImplementedError:
        return None
    return all(torch.equal(a, b) for a, b in zip(expected, workload.tensors(), strict=True))


def _holds_gpu(pid: int) -> bool:
    """CUDA's runtime keeps this device open in every process that initialised it."""
    try:
        links = [os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()]
    except OSError:
        return False
    return any(link.startswith("/dev/nvidia-uvm") for link in links)


class _PinnedCopy:
    """The same bytes, as one block, into pinned memory."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self._source = torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in tensors])
        self._target = torch.empty(self._source.shape, dtype=torch.uint8, pin_memory=True)
        self.measure()  # touches it

    def measure(self) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self._target.copy_(self._source, non_blocking=True)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


class _Chain:
    """Kernels on the trainer's stream, of about the same length every time."""

    def __init__(self) -> None:
        self._a = torch.randn(_MATRIX, _MATRIX, device="cuda")
        self._b = torch.randn(_MATRIX, _MATRIX, device="cuda")
        self._length = 8
        self.measure(None)  # loads the kernels
        seconds, _ = self.measure(None)
        self._length = max(1, round(self._length * 2 * _CHAIN_SECS / seconds))

    def measure(self, save: Callable[[], Pending] | None) -> tuple[float, Pending | None]:
        """Seconds on the stream for kernels, the save, kernels."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        self._enqueue()
        pending = save() if save is not None else None
        self._enqueue()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3, pending

    def _enqueue(self) -> None:
        for _ in range(self._length):
            torch.mm(self._a, self._b)
