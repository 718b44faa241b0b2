"""``torch.save`` to a file, and fsync."""

from __future__ import annotations

import os
from pathlib import Path

from tests.benchmarks.peers.contracts import Done, Peer, Session, path_of
from tests.benchmarks.peers.restore import copy_into
from tests.benchmarks.workload import Workload


class TorchSaveSession(Session):
    def __init__(self, workload: Workload, directory: Path) -> None:
        self._workload = workload
        self._directory = directory

    def save(self, step: int) -> Done:
        import torch

        with open(path_of(self._directory, step, ".pt"), "wb") as file:
            torch.save(self._workload.collect(), file)
            file.flush()
            os.fsync(file.fileno())
        return Done()

    def load(self, step: int) -> None:
        import torch

        copy_into(self._workload, torch.load(path_of(self._directory, step, ".pt"), weights_only=True))


PEERS = (Peer("torch-save", "torch.save + fsync", "blocks", True, TorchSaveSession, blocking=True),)
