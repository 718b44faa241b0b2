"""What the machine can do with the same bytes, measured right beside each save."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import torch

from tests.benchmarks.records import Limits

_PIECE_BYTES = 16 << 20
_SMALL_BYTES = 64 << 10
_MANY = 1000  # from here on, the batched copy of all tensors is a limit of its own

Piece = tuple[int, int, int]  # source address, target address, bytes


class LimitMeter:
    """Copies and writes as many bytes as the state has.

    Large tensors are copied from where they are. Small ones are not a limit of memory but of how many there are: their bytes
    come from one block, and ``foreach`` is measured beside it.

    Args:
        tensors: of the state, on the CPU.
        directory: where the raw file is written.
        threads: how many threads stager copies with on this machine.
    """

    def __init__(self, tensors: list[torch.Tensor], directory: Path, threads: int) -> None:
        self._path = directory / "raw"
        self._threads = threads
        self._executor = ThreadPoolExecutor(threads)
        nbytes = sum(tensor.nbytes for tensor in tensors)
        self._target = torch.ones(max(1, nbytes), dtype=torch.uint8)  # touched: warm
        self._nbytes = nbytes
        self._large = [t for t in tensors if t.nbytes >= _SMALL_BYTES and t.is_contiguous()]
        self._rest = torch.ones(max(1, nbytes - sum(t.nbytes for t in self._large)), dtype=torch.uint8)
        self._many = [t.detach() for t in tensors] if len(tensors) >= _MANY else []
        self._copies = [torch.empty_like(t) for t in self._many]

    def measure(self) -> Limits:
        write = self._write()
        return Limits(*self.memcpy(), self._foreach(), write)

    def memcpy(self) -> tuple[float, float]:
        """Seconds with one thread, and with as many as stager uses."""
        return self._copy(1), self._copy(self._threads)

    def _copy(self, threads: int) -> float:
        # Addresses are asked for every time: with ``staging.location: workers`` the state's memory is moved.
        pieces = list(_pieces([*self._large, self._rest], self._target.data_ptr(), self._nbytes))
        iterator = iter(pieces)  # shared: next() on a list's iterator is atomic

        def work() -> None:
            for source, target, nbytes in iterator:
                ctypes.memmove(target, source, nbytes)  # releases the GIL

        started = time.perf_counter()
        others = [self._executor.submit(work) for _ in range(min(threads, len(pieces)) - 1)]
        work()
        wait(others)
        return time.perf_counter() - started

    def _foreach(self) -> float | None:
        if not self._many:
            return None
        started = time.perf_counter()
        torch._foreach_copy_(self._copies, self._many)
        return time.perf_counter() - started

    def _write(self) -> float:
        view = memoryview(self._target.numpy())
        started = time.perf_counter()
        fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            for start in range(0, len(view), _PIECE_BYTES):
                os.pwrite(fd, view[start : start + _PIECE_BYTES], start)
            os.fsync(fd)
        finally:
            os.close(fd)
        seconds = time.perf_counter() - started
        self._path.unlink()
        return seconds

    def close(self) -> None:
        self._executor.shutdown()


def _pieces(sources: list[torch.Tensor], target: int, nbytes: int) -> Iterator[Piece]:
    offset = 0
    for source in sources:
        length = min(source.nbytes, nbytes - offset)
        for start in range(0, length, _PIECE_BYTES):
            yield source.data_ptr() + start, target + offset + start, min(_PIECE_BYTES, length - start)
        offset += length
