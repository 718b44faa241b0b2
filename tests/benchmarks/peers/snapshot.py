"""torchsnapshot's ``async_take``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.benchmarks.peers.contracts import Peer, Session, path_of
from tests.benchmarks.workload import Workload


class _Pending:
    def __init__(self, pending: Any) -> None:
        self._pending = pending

    def wait_staged(self) -> None:
        pass  # async_take returns when everything is staged

    def stored(self) -> bool:
        return bool(self._pending.done())

    def wait_stored(self) -> None:
        self._pending.wait()


class SnapshotSession(Session):
    def __init__(self, workload: Workload, directory: Path) -> None:
        from torchsnapshot import StateDict

        self._directory = directory
        self._app_state = {
            name: StateDict(**value) if isinstance(value, dict) else value for name, value in workload.objects.items()
        }

    def save(self, step: int) -> _Pending:
        from torchsnapshot import Snapshot

        return _Pending(Snapshot.async_take(str(path_of(self._directory, step)), self._app_state))

    def load(self, step: int) -> None:
        from torchsnapshot import Snapshot

        Snapshot(str(path_of(self._directory, step))).restore(self._app_state)


PEERS = (Peer("torchsnapshot", "torchsnapshot", "does not sync", False, SnapshotSession, needs="torchsnapshot"),)
