"""torch_checkpointing, the package: its manager's defaults, and without O_DIRECT, which ext4 refuses for odd lengths."""

from __future__ import annotations

from concurrent.futures import Future
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from tests.benchmarks.peers.contracts import Peer, Session, path_of
from tests.benchmarks.workload import Workload


class _Pending:
    def __init__(self, staged: Future[Any], stored: Future[Any]) -> None:
        self._staged, self._stored = staged, stored

    def wait_staged(self) -> None:
        self._staged.result()

    def stored(self) -> bool:
        return self._stored.done()

    def wait_stored(self) -> None:
        self._stored.result()


class ManagerSession(Session):
    def __init__(self, workload: Workload, directory: Path, *, direct: bool = True) -> None:
        from torch_checkpointing import CheckpointManager
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        storage = LocalFileSystemStorageConfig() if direct else LocalFileSystemStorageConfig(use_direct_io=False)
        self._workload = workload
        self._directory = directory
        self._manager = CheckpointManager.Config(storage_config=storage).build()

    def save(self, step: int) -> _Pending:
        stored = self._manager.save(str(path_of(self._directory, step)), self._workload.collect())
        # The manager keeps to itself when the copy is done; its lock, which users hold around a step, waits for the same.
        return _Pending(self._manager._staging_future, stored)

    def load(self, step: int) -> None:
        into = self._workload.collect()
        loaded = self._manager.load(str(path_of(self._directory, step)), into=into)
        for name, target in self._workload.objects.items():
            if not isinstance(target, dict):
                target.load_state_dict(loaded[name])

    def around_step(self) -> AbstractContextManager[object]:
        lock: AbstractContextManager[object] = self._manager.lock()
        return lock

    def close(self) -> None:
        self._manager.close()


PEERS = (
    Peer(
        "torch-checkpointing",
        "torch_checkpointing",
        "its defaults; does not sync",
        False,
        ManagerSession,
        needs="torch_checkpointing",
    ),
    Peer(
        "torch-checkpointing-buffered",
        "torch_checkpointing, no O_DIRECT",
        "does not sync",
        False,
        lambda w, d: ManagerSession(w, d, direct=False),
        needs="torch_checkpointing",
    ),
)
