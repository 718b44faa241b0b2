"""A state of which most is frozen, and what its checkpoints share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from stager.workers.checkpoint.directory.run_directory import CheckpointInfo
from tests.persistence.tasks import make_task, run

FROZEN_FILES = ("__0_0.distcp", "__0_1.distcp")
ADAPTER_FILE = "__0_2.distcp"


def frozen_and_adapter(value: float) -> dict[str, Any]:
    """Two frozen roles and an adapter, each of more than 64 KiB, interleaved; only the adapter depends on ``value``."""
    layers = {
        str(i): {
            "weight": torch.full((100, 100), float(i)),
            "bias": torch.full((10_000,), -float(i)),
            "adapter": torch.full((10_000,), value + i),
        }
        for i in range(3)
    }
    return {"layers": layers, "step": value}


def save_incrementally(
    directory: Path, value: float, step: int, base_step: int | None, **options: Any
) -> CheckpointInfo:
    directory.mkdir(exist_ok=True)
    job = make_task(directory, frozen_and_adapter(value), step=step, incremental=True, base_step=base_step, **options)
    return run(job).info


def shared_files(first: str, second: str) -> list[str]:
    """Names that are the same inode in both directories."""
    names = {path.name: path.stat().st_ino for path in Path(first).iterdir()}
    return sorted(path.name for path in Path(second).iterdir() if names.get(path.name) == path.stat().st_ino)
