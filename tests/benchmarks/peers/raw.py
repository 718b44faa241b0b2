"""No checkpoint at all.

raw-write   another process writes as many bytes of its own memory, and syncs them: what nobody can be below
nothing     nothing is done: what the loop's figures are worth, measured in the same way (an A/A run)
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
from multiprocessing.connection import Connection
from pathlib import Path

from tests.benchmarks.peers.contracts import Done, Peer, Session, path_of
from tests.benchmarks.workload import Workload

_PIECE_BYTES = 8 << 20
_BLOCK_BYTES = 4096


class _Pending:
    def __init__(self, channel: Connection) -> None:
        self._channel = channel
        self._done = False

    def wait_staged(self) -> None:
        pass

    def stored(self) -> bool:
        if not self._done and self._channel.poll():
            self.wait_stored()
        return self._done

    def wait_stored(self) -> None:
        if not self._done:
            error = self._channel.recv()
            self._done = True
            if error:
                raise OSError(error)


class RawWriteSession(Session):
    def __init__(self, workload: Workload, directory: Path) -> None:
        nbytes = sum(tensor.nbytes for tensor in workload.tensors())
        context = multiprocessing.get_context("spawn")
        self._channel, theirs = context.Pipe()
        self._directory = directory
        self._process = context.Process(target=_serve, args=(theirs, nbytes), daemon=True)
        self._process.start()
        theirs.close()
        self._channel.recv()

    def save(self, step: int) -> _Pending:
        directory = path_of(self._directory, step)
        directory.mkdir()
        self._channel.send(str(directory / "raw"))
        return _Pending(self._channel)

    def close(self) -> None:
        self._channel.send(None)
        self._process.join()
        self._channel.close()


def _serve(channel: Connection, nbytes: int) -> None:
    nbytes = -(-nbytes // _BLOCK_BYTES) * _BLOCK_BYTES
    with mmap.mmap(-1, nbytes) as memory, memoryview(memory) as view:
        for start in range(0, nbytes, mmap.PAGESIZE):
            view[start] = 1
        channel.send(None)
        while (path := channel.recv()) is not None:
            try:
                _write(path, view)
                channel.send("")
            except OSError as error:
                channel.send(str(error))


def _write(path: str, view: memoryview) -> None:
    fd = _open(path)
    try:
        for start in range(0, len(view), _PIECE_BYTES):
            os.pwrite(fd, view[start : start + _PIECE_BYTES], start)
        os.fsync(fd)
    finally:
        os.close(fd)


def _open(path: str) -> int:
    """Past the page cache where that works: the less work for the processor."""
    flags = os.O_WRONLY | os.O_CREAT
    try:
        return os.open(path, flags | os.O_DIRECT)
    except OSError:
        return os.open(path, flags)


class NothingSession(Session):
    """Saves nothing."""

    def __init__(self, workload: Workload, directory: Path) -> None:
        pass

    def save(self, step: int) -> Done:
        return Done()


PEERS = (
    Peer("nothing", "no save at all", "an A/A run: its cost is noise", True, NothingSession),
    Peer(
        "raw-write", "as many bytes, written by another process", "no snapshot, no hash: a limit", True, RawWriteSession
    ),
)
