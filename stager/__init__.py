"""Checkpoint staging for PyTorch that training does not wait for.

    from stager import Checkpointer

    with Checkpointer("runs/gpt") as ckpt:
        resumed = ckpt.load(into={"model": model, "optimizer": optimizer})
        for step in range(resumed.step + 1 if resumed else 0, steps):
            ...
            if step % 100 == 0:
                ckpt.save(step, {"model": model, "optimizer": optimizer})

``__init__.pyi`` names everything public, for type checkers and for this file. Names are imported when they are first used,
so that ``stager --help`` does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

with open(f"{__file__}i", encoding="utf-8") as _stub:  # each line: from MODULE import NAME as NAME
    _MODULE_OF = {line.split()[3]: line.split()[1] for line in _stub if line.startswith("from ")}

_NOT_IN_ALL = {"Event", "_ReplicationStager"}  # one would hide names of others, the other is private to torch
__all__ = [name for name in _MODULE_OF if name not in _NOT_IN_ALL]


def __getattr__(name: str) -> Any:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module 'stager' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(module), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
<<<<<<< HEAD
=======


if TYPE_CHECKING:
    from stager.checkpointer import Checkpointer as Checkpointer
    from stager.config import StagerConfig as StagerConfig
    from stager.config import load_config as load_config
    from stager.exporting.export import Exported as Exported
    from stager.exporting.export import export_checkpoint as export_checkpoint
    from stager.loading.foreign import load_checkpoint as load_checkpoint
    from stager.loading.loaded import Loaded as Loaded
    from stager.operations import RecoverReport as RecoverReport
    from stager.operations import prune as prune
    from stager.operations import recover as recover
    from stager.operations import verify as verify
    from stager.saving.preemption import Preemption as Preemption
    from stager.saving.save_handle import SaveHandle as SaveHandle
    from stager.state.per_rank import PerRank as PerRank
    from stager.telemetry.event import Event as Event
    from stager.telemetry.report import SaveReport as SaveReport
    from stager.telemetry.report import SaveState as SaveState
    from stager.torch_api.staging import AsyncStager as AsyncStager
    from stager.torch_api.staging import BlockingAsyncStager as BlockingAsyncStager
    from stager.torch_api.staging import CheckpointStager as CheckpointStager
    from stager.torch_api.staging import CheckpointStagerConfig as CheckpointStagerConfig
    from stager.torch_api.staging import DefaultStager as DefaultStager
    from stager.torch_api.staging import ReplicationStager as ReplicationStager
    from stager.torch_api.staging import StagingOptions as StagingOptions
    from stager.torch_api.staging import _ReplicationStager as _ReplicationStager
    from stager.torch_api.staging import auto_options as auto_options
    from stager.torch_api.staging.state_dict_stager import StateDictStager as StateDictStager
    from stager.torch_api.storage import StagerStorageReader as StagerStorageReader
    from stager.torch_api.storage import StagerStorageWriter as StagerStorageWriter
    from stager.workers.checkpoint.directory.run_directory import CheckpointInfo as CheckpointInfo
    from stager.workers.checkpoint.directory.run_directory import SkippedCheckpoint as SkippedCheckpoint
    from stager.workers.checkpoint.maintenance.recover import RecoveredDirectory as RecoveredDirectory
    from stager.workers.checkpoint.maintenance.recover import RecoverOutcome as RecoverOutcome
    from stager.workers.checkpoint.maintenance.retention import PruneFate as PruneFate
    from stager.workers.checkpoint.maintenance.retention import PruneReport as PruneReport
    from stager.workers.checkpoint.maintenance.retention import PruneVerdict as PruneVerdict
    from stager.workers.checkpoint.read.verify import VerifyReport as VerifyReport
    from stager.workers.errors import ArenaFullError as ArenaFullError
    from stager.workers.errors import CheckpointNotFoundError as CheckpointNotFoundError
    from stager.workers.errors import ClosedError as ClosedError
    from stager.workers.errors import ConfigError as ConfigError
    from stager.workers.errors import CorruptCheckpointError as CorruptCheckpointError
    from stager.workers.errors import DirectoryInUseError as DirectoryInUseError
    from stager.workers.errors import InconsistentRanksError as InconsistentRanksError
    from stager.workers.errors import InternalError as InternalError
    from stager.workers.errors import LeftRunningError as LeftRunningError
    from stager.workers.errors import MemoryBudgetError as MemoryBudgetError
    from stager.workers.errors import RankFailedError as RankFailedError
    from stager.workers.errors import ReplicationError as ReplicationError
    from stager.workers.errors import StagerError as StagerError
    from stager.workers.errors import StateMismatchError as StateMismatchError
    from stager.workers.errors import StorageError as StorageError
    from stager.workers.errors import TaskTimeoutError as TaskTimeoutError
    from stager.workers.errors import TornSnapshotError as TornSnapshotError
    from stager.workers.errors import UnsafePickleError as UnsafePickleError
    from stager.workers.errors import UnstageableError as UnstageableError
    from stager.workers.errors import UsageError as UsageError
    from stager.workers.errors import WorkerDiedError as WorkerDiedError
    from stager.workers.errors import WorkerError as WorkerError
    from stager.workers.errors import WorkerStartError as WorkerStartError
>>>>>>> hB
