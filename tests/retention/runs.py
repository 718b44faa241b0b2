"""Runs with many tiny checkpoints, and how to look at them without changing anything."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from stager.workers.checkpoint.directory.run_directory import committed_steps, list_checkpoints
from stager.workers.checkpoint.read.verify import verify_checkpoint
from tests.persistence.tasks import save


def make_run(directory: Path, steps: Iterable[int]) -> Path:
    """Committed in this order."""
    for step in steps:
        save(directory, {"x": torch.full((50,), float(step))}, step=step, num_parts=1, fsync=False)
    return directory


def steps_of(directory: Path) -> list[int]:
    """Oldest first. Each of them is whole, and nothing else looks like one."""
    found, skipped = list_checkpoints(directory)
    assert not skipped, skipped
    assert all(verify_checkpoint(info.path).ok for info in found)
    assert [info.step for info in found] == committed_steps(str(directory))[::-1]
    return [info.step for info in found]


def damage(directory: Path, step: int) -> None:
    """A bit of a data file."""
    path = directory / f"step-{step:08d}" / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)


def everything_in(directory: Path) -> list[tuple[str, int, int, int, int, int]]:
    """Every name with inode, links, size and times: what no look may change."""
    stats = [(str(path), path.lstat()) for path in sorted([directory, *directory.rglob("*")])]
    return [(name, s.st_ino, s.st_nlink, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in stats]
