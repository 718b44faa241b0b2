"""``StagerStorageWriter``: ``dcp.save`` and ``dcp.async_save`` into hashed files, committed by one rename.

1. coordinator   ``prepare_global_plan``: make the partial directory; number the ranks
2. every rank    ``write_data``: write and sync data files there, several threads at once
3. coordinator   ``finish``: assemble the layout, write ``.metadata`` and ``manifest.json``, rename the directory

An error in 2 or 3 removes the partial directory, so that the save fails on every rank.
"""

from __future__ import annotations

import math
import os
import pickle
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.filesystem import _StorageInfo, _StoragePrefix
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from stager.config.host import reading_threads
from stager.ranks.launch import local_world_size
from stager.torch_api.storage.assembly import assemble
from stager.torch_api.storage.spans import Payload, SpanWriter, Written, payload_of
from stager.torch_api.storage.target import Target
from stager.workers._version import __version__
from stager.workers.checkpoint.documents.manifest import ManifestHeader
from stager.workers.checkpoint.storage.posix.files import storage_errors
from stager.workers.errors import UnstageableError, UsageError

_SMALLEST_FILE_BYTES = 16 << 20  # below this, another thread and file cost more time than they save


class StagerStorageWriter(StorageWriter):
    """Writes a checkpoint whole or not at all: ``dcp.save(state, storage_writer=StagerStorageWriter(path))``.

    Ranks write and sync their files in a partial directory beside ``path``; the coordinator adds ``.metadata`` and
    ``manifest.json`` and renames it. The result is read by ``dcp.load`` with or without stager, and checked by
    ``stager verify``. All ranks must see one file system.

    Args:
        path: the checkpoint's directory; parents are made. ``checkpoint_id`` of ``dcp.save`` overrides it.
        fsync: sync files and directories, in the order that survives a power failure.
        num_threads: how many threads of this rank write. Default: the cores divided by the local ranks, at most 8.
        overwrite: replace a checkpoint at ``path`` atomically; False: raise ``UsageError`` instead.

    Attributes:
        save_id: of the save, as that of torch's own writer; on the coordinator it is that of the manifest. A new one after
            each ``reset()``, and when another save begins.

    Errors reach the caller as DCP wraps them: ``CheckpointException`` with ``failures`` by rank.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        fsync: bool = True,
        num_threads: int | None = None,
        overwrite: bool = True,
    ) -> None:
        super().__init__()
        if num_threads is not None and num_threads < 1:
            raise UsageError(f"num_threads is {num_threads}; it must be at least 1")
        self._fsync = fsync
        self._num_threads = num_threads or max(1, reading_threads() // local_world_size(os.environ))
        self._overwrite = overwrite
        self._target = Target(path, overwrite)
        self.save_id = uuid.uuid4().hex
        self._is_committed = False

    @property
    def checkpoint_id(self) -> str:
        """The final path."""
        return self._target.path

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin a new save, at ``checkpoint_id`` if it is given."""
        self._target = Target(checkpoint_id or self._target.path, self._overwrite)
        self.save_id = uuid.uuid4().hex
        self._is_committed = False

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Refuse ``use_collectives=False``.

        Raises:
            UsageError: ``use_collectives=False``, with which each rank would write a checkpoint of its own.
        """
        if not kwargs.get("use_collectives", True):
            raise UsageError(
                "use_collectives=False makes each rank write a checkpoint of its own; StagerStorageWriter writes one "
                "checkpoint of all ranks, and needs use_collectives=True"
            )
        if self._is_committed:  # without a ``checkpoint_id``, DCP does not call reset()
            self.reset()

    def storage_meta(self) -> StorageMeta:
        """The path and the id of this save, for DCP's metadata."""
        return StorageMeta(checkpoint_id=self.checkpoint_id, save_id=self.save_id)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return the plan unchanged."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Number the ranks and make the partial directory.

        Raises:
            UsageError: the path exists and must not be replaced.
            StorageError
        """
        self._target.prepare()
        return [replace(plan, storage_data=_StoragePrefix(f"__{rank}_")) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's values. With ``fsync`` they are durable when it returns.

        Raises:
            StorageError: a write failed. The partial directory is removed, so that the save fails on every rank.
        """
        future: Future[list[WriteResult]] = Future()
        with self._target.discarded_on_error():
            future.set_result(self._write(plan, planner))
        return future

    def _write(self, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        # Of the type that FileSystemWriter uses, too: a planner may have cached a plan that was made for that writer.
        prefix: str = plan.storage_data.prefix
        buckets = _partition(plan.items, self._num_threads)
        with ExitStack() as opened:
            directory_fd = self._target.open_partial()
            opened.callback(os.close, directory_fd)
            names = [f"{prefix}{number}{filesystem.DEFAULT_SUFFIX}" for number in range(len(buckets))]
            writers = [
                opened.enter_context(closing(SpanWriter(directory_fd, self._target.partial, name))) for name in names
            ]
            run: Any = map
            if len(buckets) > 1:
                executor = ThreadPoolExecutor(len(buckets), thread_name_prefix="stager-write")
                run = opened.enter_context(executor).map  # its threads end before the files are closed
            done = list(run(partial(self._write_file, planner), buckets, writers))
            if self._fsync:
                with storage_errors("sync", self._target.partial):
                    os.fsync(directory_fd)
        return [result for results in done for result in results]

    def _write_file(self, planner: SavePlanner, bucket: list[WriteItem], writer: SpanWriter) -> list[WriteResult]:
        results = []
        for item in bucket:
            written = writer.append(_payload(item.index.fqn, planner.resolve_data(item)))
            results.append(WriteResult(item.index, written.item.nbytes, written))
        writer.finish(self._fsync)
        return results

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Commit the checkpoint. The coordinator calls it.

        Raises:
            StorageError, UsageError: the commit failed. Nothing at the path has changed; the partial directory is removed.
        """
        written: list[tuple[Any, Written]] = [(one.index, one.storage_data) for rank in results for one in rank]
        with self._target.discarded_on_error():
            layout, hashes = assemble(metadata, written)
            metadata.version = getattr(filesystem, "CURRENT_DCP_VERSION", None)  # older versions of torch lack it
            metadata.storage_data = {
                index: _StorageInfo(one.file, one.item.offset, one.item.nbytes) for index, one in written
            }
            metadata.storage_meta = self.storage_meta()
            created, torch_version = time.time(), str(torch.__version__)
            header = ManifestHeader("dcp", self._target.step, self.save_id, created, torch_version, __version__)
            self._target.commit(header, layout, hashes, pickle.dumps(metadata), self._fsync)
        self._is_committed = True

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether ``checkpoint_id`` is a path in a file system, and not a URL."""
        return "://" not in os.fspath(checkpoint_id)


def _payload(name: str, value: Any) -> Payload:
    try:
        return payload_of(value)
    except Exception as error:
        raise UnstageableError(name, f"torch.save cannot pickle it: {error}") from error


def _partition(items: list[WriteItem], num_threads: int) -> list[list[WriteItem]]:
    """Divide items among files of about equal size. Objects, whose size is unknown, go last into the first file."""
    tensors = [(_nbytes(item), number) for number, item in enumerate(items) if item.type != WriteItemType.BYTE_IO]
    total = sum(nbytes for nbytes, _ in tensors)
    count = max(1, min(num_threads, total // _SMALLEST_FILE_BYTES))
    loads, numbers = [0] * count, [list[int]() for _ in range(count)]
    for nbytes, number in sorted(tensors, reverse=True):
        lightest = loads.index(min(loads))
        loads[lightest] += nbytes
        numbers[lightest].append(number)
    buckets = [[items[number] for number in sorted(of_file)] for of_file in numbers]
    buckets[0] += [item for item in items if item.type == WriteItemType.BYTE_IO]
    return [bucket for bucket in buckets if bucket]  # no empty files


def _nbytes(item: WriteItem) -> int:
    if item.tensor_data is None or item.tensor_data.chunk is None:
        return 0
    return math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize
