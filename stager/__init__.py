"""Checkpoint staging for PyTorch that training does not wait for.

    from stager import Checkpointer

    with Checkpointer("runs/gpt") as ckpt:
        resumed = ckpt.load(into={"model": model, "optimizer": optimizer})
        for step in range(resumed.step + 1 if resumed else 0, steps):
            ...
            if step % 100 == 0:
                ckpt.save(step, {"model": model, "optimizer": optimizer})

Names are imported when they are first used, so that ``stager --help`` does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from stager._version import __version__

_HOME = {
    "stager.checkpointer": ("Checkpointer",),
    "stager.config": ("StagerConfig", "load_config"),
    "stager.exporting.export": ("Exported", "export_checkpoint"),
    "stager.loading.foreign": ("load_checkpoint",),
    "stager.loading.loader": ("Loaded",),
    "stager.ranks.per_rank": ("PerRank",),
    "stager.saving.save": ("Event", "SaveHandle", "SaveReport", "SaveState"),
    "stager.staging": (
        "AsyncStager",
        "BlockingAsyncStager",
        "CheckpointStager",
        "CheckpointStagerConfig",
        "DefaultStager",
        "ReplicationStager",
        "StagingOptions",
        "_ReplicationStager",
        "auto_options",
    ),
    "stager.saving.preemption": ("Preemption",),
    "stager.staging.state_dict_stager": ("StateDictStager",),
    "stager.storage": ("StagerStorageReader", "StagerStorageWriter"),
    "workers.directory": ("CheckpointInfo", "SkippedCheckpoint"),
    "workers.errors": (
        "ArenaFullError",
        "CheckpointNotFoundError",
        "ClosedError",
        "ConfigError",
        "CorruptCheckpointError",
        "DirectoryInUseError",
        "InconsistentRanksError",
        "InternalError",
        "LeftRunningError",
        "MemoryBudgetError",
        "RankFailedError",
        "ReplicationError",
        "StagerError",
        "StateMismatchError",
        "StorageError",
        "TaskTimeoutError",
        "TornSnapshotError",
        "UnsafePickleError",
        "UnstageableError",
        "UsageError",
        "WorkerDiedError",
        "WorkerError",
        "WorkerStartError",
    ),
    "workers.retention": ("PruneReport",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [*_MODULE_OF, "__version__"]  # noqa: PLE0604  (strings, every one)


def __getattr__(name: str) -> Any:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module 'stager' has no attribute {name!r}")
    value = getattr(import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    from stager.checkpointer import Checkpointer as Checkpointer
    from stager.config import StagerConfig as StagerConfig
    from stager.config import load_config as load_config
    from stager.exporting.export import Exported as Exported
    from stager.exporting.export import export_checkpoint as export_checkpoint
    from stager.loading.foreign import load_checkpoint as load_checkpoint
    from stager.loading.loader import Loaded as Loaded
    from stager.ranks.per_rank import PerRank as PerRank
    from stager.saving.preemption import Preemption as Preemption
    from stager.saving.save import Event as Event
    from stager.saving.save import SaveHandle as SaveHandle
    from stager.saving.save import SaveReport as SaveReport
    from stager.saving.save import SaveState as SaveState
    from stager.staging import AsyncStager as AsyncStager
    from stager.staging import BlockingAsyncStager as BlockingAsyncStager
    from stager.staging import CheckpointStager as CheckpointStager
    from stager.staging import CheckpointStagerConfig as CheckpointStagerConfig
    from stager.staging import DefaultStager as DefaultStager
    from stager.staging import ReplicationStager as ReplicationStager
    from stager.staging import StagingOptions as StagingOptions
    from stager.staging import _ReplicationStager as _ReplicationStager
    from stager.staging import auto_options as auto_options
    from stager.staging.state_dict_stager import StateDictStager as StateDictStager
    from stager.storage import StagerStorageReader as StagerStorageReader
    from stager.storage import StagerStorageWriter as StagerStorageWriter
    from workers.directory import CheckpointInfo as CheckpointInfo
    from workers.directory import SkippedCheckpoint as SkippedCheckpoint
    from workers.errors import ArenaFullError as ArenaFullError
    from workers.errors import CheckpointNotFoundError as CheckpointNotFoundError
    from workers.errors import ClosedError as ClosedError
    from workers.errors import ConfigError as ConfigError
    from workers.errors import CorruptCheckpointError as CorruptCheckpointError
    from workers.errors import DirectoryInUseError as DirectoryInUseError
    from workers.errors import InconsistentRanksError as InconsistentRanksError
    from workers.errors import InternalError as InternalError
    from workers.errors import LeftRunningError as LeftRunningError
    from workers.errors import MemoryBudgetError as MemoryBudgetError
    from workers.errors import RankFailedError as RankFailedError
    from workers.errors import ReplicationError as ReplicationError
    from workers.errors import StagerError as StagerError
    from workers.errors import StateMismatchError as StateMismatchError
    from workers.errors import StorageError as StorageError
    from workers.errors import TaskTimeoutError as TaskTimeoutError
    from workers.errors import TornSnapshotError as TornSnapshotError
    from workers.errors import UnsafePickleError as UnsafePickleError
    from workers.errors import UnstageableError as UnstageableError
    from workers.errors import UsageError as UsageError
    from workers.errors import WorkerDiedError as WorkerDiedError
    from workers.errors import WorkerError as WorkerError
    from workers.errors import WorkerStartError as WorkerStartError
    from workers.retention import PruneReport as PruneReport
