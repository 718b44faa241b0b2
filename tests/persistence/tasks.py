"""Saves without worker processes: the same jobs, run in this process, so that every system call can be watched."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from stager.loading.restore import Restorer
from stager.snapshot.batches import batch
from stager.snapshot.copying import Copier
from stager.snapshot.pieces import whole
from stager.snapshot.slab_writer import SlabWriter
from stager.state.flatten import flatten
from stager.state.snapshot_plan import Planner
from stager.workers.checkpoint.commit import persist
from stager.workers.checkpoint.commit.commit import Committed
from stager.workers.checkpoint.directory.run_directory import CheckpointInfo, read_checkpoint
from stager.workers.checkpoint.documents.names import checkpoint_name
from stager.workers.checkpoint.formats import contract, get_format
from stager.workers.checkpoint.write.save_spec import SaveSpec
from stager.workers.checkpoint.write.write_task import WriteTask
from stager.workers.memory.slab import Slab

SMALL_STATE = {"a": torch.arange(40, dtype=torch.float32), "b": {"c": torch.arange(7), "n": 3}}


def make_task(
    directory: Path,
    state: Mapping[str, Any] = SMALL_STATE,
    *,
    step: int = 1,
    num_parts: int = 2,
    segment_bytes: int = 64 << 20,
    fsync: bool = True,
    num_files: int | None = None,
    kind: str = "dcp",
    incremental: bool = False,
    base_step: int | None = None,
    full_every: int = 16,
    metrics: dict[str, float] | None = None,
    created: float | None = None,
) -> WriteTask:
    """What the trainer hands over. ``num_files``: split even a small state into so many files."""
    file_format, flat = get_format(kind), flatten(state)
    with pytest.MonkeyPatch.context() as patch:
        if num_files is not None:
            patch.setattr(contract, "SMALLEST_FILE_BYTES", 1)
        planner = Planner(file_format, num_files or num_parts, segment_bytes, incremental=incremental)
        plan = planner.plan(flat)
    blobs = plan.with_trailer([file_format.object_blob(flat.leaves[leaf], leaf).blob for leaf in plan.objects])
    pieces = whole(plan, blobs, num_parts, 1 << 62 if incremental else 0)
    slab = Slab.create(pieces.slab_nbytes)
    Copier(1).copy(batch(plan.copies), flat.leaves, slab)
    spec = SaveSpec(
        directory=str(directory),
        step=step,
        save_id=secrets.token_hex(8),
        kind=kind,
        num_parts=num_parts,
        fsync=fsync,
        created=time.time() if created is None else created,
        stager="0",
        torch=torch.__version__,
        whole_bytes=1 << 62 if incremental else 0,
        base=None if base_step is None else checkpoint_name(base_step),
        full_every=full_every,
        metrics=metrics or {},
    )
    return SlabWriter().write(spec, pieces, pieces.pieces[0], slab, frozenset({slab.slab_id}))


def run(job: WriteTask) -> Committed:
    """Every part, one after the other."""
    results = [persist.persist_part(job, part).committed for part in range(job.spec.num_parts)]
    commits = [committed for committed in results if committed is not None]
    assert len(commits) == 1 and results[-1] is not None
    return commits[0]


def save(directory: Path, state: Mapping[str, Any] = SMALL_STATE, **options: Any) -> CheckpointInfo:
    directory.mkdir(exist_ok=True)
    return run(make_task(directory, state, **options)).info


def restorer(info: CheckpointInfo, *, allow_pickle: bool = False, num_threads: int = 2) -> Restorer:
    _, manifest = read_checkpoint(str(Path(info.path).parent), info.step)
    return Restorer(info.path, manifest, num_threads, allow_pickle)


def load(info: CheckpointInfo) -> Any:
    return restorer(info).load()


class Crash(BaseException):
    """The process is gone: nothing catches this, but descriptors are closed and locks released, as the kernel does."""


# What changes or reads the file system on the way of a save. ``renameat2`` goes by ctypes; it is between two of these.
_CALLS = (
    "open",
    "mkdir",
    "link",
    "rename",
    "unlink",
    "rmdir",
    "ftruncate",
    "fsync",
    "pwritev",
    "listdir",
    "stat",
    "fstat",
)


@contextmanager
def failing_call(number: int, fail: Callable[[str], BaseException]) -> Iterator[Callable[[], bool]]:
    """The ``number``-th system call from now on raises what ``fail(name)`` makes. Yields: whether it came to that."""
    count = 0
    originals = {name: getattr(os, name) for name in _CALLS}
    originals["fsync"] = lambda fd: None  # what a disk makes durable is not what is watched here, and it takes long

    def wrap(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == number:
                raise fail(name)
            return original(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name, original in originals.items():
            patch.setattr(os, name, wrap(name, original))
        yield lambda: count >= number


def in_turn(attempt: Callable[[int], bool]) -> int:
    """``attempt(1)``, ``attempt(2)``, ... until one says that there was no such call; how many there were."""
    number = 1
    while attempt(number):
        number += 1
        assert number < 1000
    return number - 1
