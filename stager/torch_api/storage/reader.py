"""``StagerStorageReader``: ``dcp.load`` of checkpoints of stager, with each hash checked, and of those of ``dcp.save``."""

from __future__ import annotations

import os
import uuid
from contextlib import closing
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from stager.config.host import reading_threads
from stager.loading.dcp.index import Index, read_index
from stager.loading.dcp.read_plan import read_plan
from stager.loading.dcp.stock import StockReader
from stager.loading.foreign_path import METADATA_NAME, find
from stager.loading.reading.plain_reader import PlainReader
from stager.workers.checkpoint.directory.reading import reading
from stager.workers.checkpoint.read.blob_reader import BlobReader
from stager.workers.checkpoint.storage.paths import place_path
from stager.workers.checkpoint.storage.places import is_url, storage_of
from stager.workers.errors import CheckpointNotFoundError, UsageError


class StagerStorageReader(StorageReader):
    """Reads a checkpoint: ``dcp.load(state, storage_reader=StagerStorageReader(path))``.

    If the checkpoint has a manifest, only objects of the state are unpickled, under ``weights_only`` rules. A whole tensor
    is read straight into a CPU target of the same dtype and strides. For all other targets (another device, dtype or
    stride, a slice of another sharding) it is read into other memory, at most 256 MiB or one tensor at a time, and copied.
    A checkpoint without a manifest is read by torch's own reader.

    Args:
        path: the checkpoint's directory. ``checkpoint_id`` of ``dcp.load`` overrides it.
        num_threads: how many reads run at a time. Default: the cores that this process may use, at most 8.
        verify: check the hashes of all bytes that are read; False: accept damaged data.
        allow_pickle: unpickle any object, which runs code from the checkpoint.

    Attributes:
        load_id: of the load, as that of torch's own reader; a new one after each ``reset()``.

    Errors reach the caller as DCP wraps them: ``CheckpointException`` with ``failures`` by rank, for example
    a ``CorruptCheckpointError``. torch 2.13 turns what ``read_metadata`` raises into an ``AssertionError`` with the same
    text. Targets that were read before damage was found are changed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        num_threads: int | None = None,
        verify: bool = True,
        allow_pickle: bool = False,
    ) -> None:
        super().__init__()
        if num_threads is not None and num_threads < 1:
            raise UsageError(f"num_threads is {num_threads}; it must be at least 1")
        self._num_threads = num_threads or reading_threads()
        self._verify = verify
        self._allow_pickle = allow_pickle
        self._path = place_path(path, "the path of the checkpoint")
        self.load_id = str(uuid.uuid4())
        self._index: Index | None = None
        self._metadata: Metadata | None = None

    @property
    def checkpoint_id(self) -> str:
        """The checkpoint's directory."""
        return self._path

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin a new load, from ``checkpoint_id`` if it is given."""
        if checkpoint_id:
            self._path = place_path(checkpoint_id, "checkpoint_id")
        self.load_id = str(uuid.uuid4())
        self._index = self._metadata = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read the manifest, or the ``.metadata`` of a checkpoint that stager did not write.

        Raises:
            CheckpointNotFoundError: there is no checkpoint.
            CorruptCheckpointError: its manifest is damaged, or a file is missing or has another size.
            UnsafePickleError: its ``.metadata`` holds more than metadata, and there is no manifest.
        """
        self._index = None
        storage = storage_of(self._path)
        if storage.has_manifest(self._path):
            self._index = read_index(self._path, self.load_id)
            return self._index.metadata
        has_metadata = storage.guarantees.foreign_files and os.path.lexists(os.path.join(self._path, METADATA_NAME))
        # Each rank may have metadata of its own; what else there is in a store nobody reads.
        if not has_metadata and (kwargs.get("rank") is None or not storage.guarantees.foreign_files):
            found = find(self._path)
            raise CheckpointNotFoundError(
                None,
                f"is no checkpoint for dcp.load: {found.origin.value} wrote it; load_checkpoint() reads it",
                self._path,
            )
        metadata = StockReader(self._path, self._allow_pickle).read_metadata(*args, **kwargs)
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Keep the metadata, which came from the coordinator."""
        self._metadata = metadata

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Return the plan unchanged."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Return the plans unchanged."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what the plan asks for.

        Raises:
            CorruptCheckpointError: a hash does not match; names the file and the value.
            UnsafePickleError: the ``weights_only`` rules do not allow an object.
            StorageError: a read failed.
        """
        if self._metadata is None:
            raise UsageError("read_data() was called before read_metadata() and set_up_storage_reader()")
        if self._index is None:
            return StockReader(self._path, self._allow_pickle).read_data(plan, planner, self._metadata)
        kind = BlobReader if self._verify else PlainReader
        with reading(self._path), closing(kind(self._path, self._index.manifest, self._num_threads)) as reader:
            read_plan(self._index, reader, plan, planner, self._allow_pickle)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether ``checkpoint_id`` is a path, or the URL of an object store that stager can reach."""
        return "://" not in os.fspath(checkpoint_id) or is_url(os.fspath(checkpoint_id))
