"""One way to save tensors of a device, on one state.

    python -m tests.gpu.measure CASE PEER SCALE SAVES DIRECTORY OUT [--dry]

    pinned copy      the same bytes as one block into page-locked memory: how fast the device can be read
    saves            the first of a process, and later ones: until the call returns, the state may be changed, it is stored
    stream blocked   kernels, a save, kernels, by the device's own clock; less the same kernels without the save
    load             back into the tensors on the device, which then have to hold what they held

Each figure is written to OUT as soon as it is there, so that what ends this process loses no more than the rest.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.footprint import tree
from tests.benchmarks.peers import PEERS, Pending, Session
from tests.benchmarks.saves import settle, time_save
from tests.benchmarks.workload import Workload

CASES = {"big": (72, 1536 << 20), "small": (20_000, 20_000 << 10)}
"""Number of float32 tensors, and their bytes."""

_CHAIN_SECS = 0.1  # of kernels on each side of a save
_MATRIX = 4096


def main(arguments: list[str]) -> None:
    """Measure, and write what was found."""
    is_dry = "--dry" in arguments
    case, peer, scale, saves, directory, out = arguments[:6]
    warnings.simplefilter("ignore")
    if is_dry:
        _simulate()
    found: dict[str, Any] = {"case": case, "peer": peer, "outcome": "did not finish"}

    def note(**figures: Any) -> None:
        found.update(figures)
        Path(out).write_text(json.dumps(found))

    note()
    try:
        _measure(case, peer, float(scale), int(saves), Path(directory), note, is_dry=is_dry)
        note(outcome="ok")
    except ModuleNotFoundError as error:
        note(outcome=f"{error.name} is not installed")
    except Exception as error:  # noqa: BLE001  # the edge of the process: a way that fails is a row that says how
        note(outcome=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}")


def _simulate() -> None:
    from stager.workers.device import host_memory
    from tests.accelerator import device

    device.set_mode("early")
    host_memory.offer(device.NAME, device.HostMemory())


def _measure(
    case: str, peer: str, scale: float, saves: int, directory: Path, note: Callable[..., None], *, is_dry: bool
) -> None:
    kind = torch.accelerator.current_accelerator()
    assert kind is not None, "torch sees no accelerator"
    device = torch.device(kind.type, 0)
    workload = _workload(case, scale, device)
    tensors = workload.tensors()
    note(nbytes=sum(tensor.nbytes for tensor in tensors), num_tensors=len(tensors))
    pinned = _PinnedCopy(tensors)
    session = PEERS[peer].open(workload, directory)
    session.warm_up()
    figures: dict[str, list[float]] = {"pinned_copy_secs": [], "blocked_secs": [], "staged_secs": [], "stored_secs": []}
    for step in range(saves + 1):
        workload.mutate()
        figures["pinned_copy_secs"].append(pinned.measure())
        for name, secs in zip(("blocked_secs", "staged_secs", "stored_secs"), _save(session, step), strict=True):
            figures[name].append(secs)
        note(**figures)
        settle(directory, step)
    chain = _Chain(device, 64 if is_dry else _MATRIX)
    lost = []
    for step in range(saves + 1, saves + 4):
        lost.append(_stream_blocked(session, step, chain))
        settle(directory, step)
    note(stream_blocked_secs=lost, worker_contexts=_contexts())
    _load(session, workload, saves + 4, note)
    session.close()


def _workload(case: str, scale: float, device: torch.device) -> Workload:
    count, nbytes = CASES[case]
    if case == "small":
        count, nbytes = max(1, int(count * scale)), int(nbytes * scale)
    length = max(1, int(nbytes if case == "small" else nbytes * scale) // count // 4)
    tensors = {f"layers.{i}.weight": torch.randn(length, device=device) for i in range(count)}
    values = list(tensors.values())
    return Workload({"model": tensors}, [torch.optim.SGD(values, lr=0.1)], values)


def _save(session: Session, step: int) -> tuple[float, float, float]:
    torch.accelerator.synchronize()
    return time_save(session, step)


def _load(session: Session, workload: Workload, step: int, note: Callable[..., None]) -> None:
    expected = [tensor.clone() for tensor in workload.tensors()]
    session.save(step).wait_stored()
    secs = []
    for _ in range(3):
        workload.mutate()
        torch.accelerator.synchronize()
        started = time.perf_counter()
        try:
            session.load(step)
        except NotImplementedError:
            return
        torch.accelerator.synchronize()
        secs.append(time.perf_counter() - started)
    is_same = all(torch.equal(a, b) for a, b in zip(expected, workload.tensors(), strict=True))
    note(load_secs=secs, correct=is_same)


def _stream_blocked(session: Session, step: int, chain: _Chain) -> float:
    before, _ = chain.measure(None)
    with_save, pending = chain.measure(lambda: session.save(step))
    assert pending is not None
    pending.wait_stored()
    after, _ = chain.measure(None)
    return with_save - (before + after) / 2


def _contexts() -> int:
    """Count the processes of this tree, besides this one, that have opened an NVIDIA device."""
    import os

    def holds_one(pid: int) -> bool:
        try:
            links = [os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()]
        except OSError:
            return False
        return any(link.startswith("/dev/nvidia-uvm") for link in links)

    return sum(map(holds_one, tree(os.getpid())[1:]))


def _timed(device: torch.device, action: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that the current stream takes, by the device's clock where torch can read it."""
    if device.type not in ("cuda", "xpu"):
        torch.accelerator.synchronize()
        started = time.perf_counter()
        result = action()
        torch.accelerator.synchronize()
        return time.perf_counter() - started, result
    stream = torch.accelerator.current_stream(device)
    start, end = (torch.Event(device, enable_timing=True) for _ in range(2))
    stream.record_event(start)
    result = action()
    stream.record_event(end)
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3, result


class _PinnedCopy:
    """The same bytes, as one block, into page-locked memory."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self._source = torch.cat([tensor.reshape(-1) for tensor in tensors]).view(torch.uint8)
        self._target = torch.empty(self._source.shape, dtype=torch.uint8, pin_memory=True)
        self.measure()  # touches it

    def measure(self) -> float:
        return _timed(self._source.device, lambda: self._target.copy_(self._source, non_blocking=True))[0]


class _Chain:
    """Kernels on the trainer's stream, of about the same length every time."""

    def __init__(self, device: torch.device, width: int) -> None:
        self._device = device
        self._a, self._b = (torch.randn(width, width, device=device) for _ in range(2))
        self._length = 8
        self.measure(None)  # loads the kernels
        secs, _ = self.measure(None)
        self._length = max(1, min(1000, round(self._length * 2 * _CHAIN_SECS / secs)))

    def measure(self, save: Callable[[], Pending] | None) -> tuple[float, Pending | None]:
        """Seconds on the stream for kernels, the save, kernels."""
        torch.accelerator.synchronize()

        def run() -> Pending | None:
            self._enqueue()
            pending = None if save is None else save()
            self._enqueue()
            return pending

        return _timed(self._device, run)

    def _enqueue(self) -> None:
        for _ in range(self._length):
            torch.mm(self._a, self._b)


if __name__ == "__main__":
    main(sys.argv[1:])
