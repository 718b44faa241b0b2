"""Reading checkpoints that ``dcp.save`` wrote without stager: torch's reader, within stager's rules for pickles.

1. ``.metadata`` is a pickle; :mod:`stager.loading.dcp.stock_metadata` reads and checks it.
2. The archive of each tensor is checked before torch opens it.
3. Each object is unpickled under ``weights_only`` rules before a planner, which would unpickle anything, gets it.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from stager.loading.dcp.objects import hand_over_object
from stager.loading.dcp.stock_metadata import parse_stock_metadata
from stager.loading.pickles.archive_check import check_archive
from stager.workers.checkpoint.storage.posix.files import open_regular, read_small, storage_errors
from stager.workers.errors import CheckpointNotFoundError, CorruptCheckpointError, StagerError


class StockReader:
    """Reads one checkpoint.

    Args:
        path: the checkpoint's directory.
        allow_pickle: unpickle any object, which runs code from the checkpoint.
        safe_globals: classes that may be unpickled, beside plain data.
    """

    def __init__(self, path: str, allow_pickle: bool, safe_globals: Sequence[str] = ()) -> None:
        self._path = path
        self._allow_pickle = allow_pickle
        self._safe_globals = safe_globals
        self._reader = FileSystemReader(path)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """As ``FileSystemReader.read_metadata``.

        Raises:
            CheckpointNotFoundError, CorruptCheckpointError, UnsafePickleError
        """
        rank = kwargs.get("rank")
        path = os.path.join(self._path, ".metadata" if rank is None else f"__{rank}.metadata")
        with storage_errors("read", path):
            try:
                data = read_small(path)
            except (FileNotFoundError, NotADirectoryError) as error:
                what = "is no checkpoint: it has neither manifest.json nor .metadata"
                raise CheckpointNotFoundError(
                    error.errno,
                    what if rank is None else "is not there either; only dcp.save(use_collectives=False) writes it",
                    path,
                ) from error
        if self._allow_pickle:
            return self._reader.read_metadata(*args, **kwargs)
        metadata = parse_stock_metadata(data, path)
        metadata.storage_meta = getattr(metadata, "storage_meta", None)
        return metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner, metadata: Metadata) -> Future[None]:
        """As ``FileSystemReader.read_data``.

        Raises:
            CorruptCheckpointError, UnsafePickleError, UnloadableError, StorageError
        """
        self._reader.set_up_storage_reader(metadata, is_coordinator=False)
        if not self._allow_pickle:
            self._check_tensors(plan, metadata)
        guarded = _GuardedPlanner(planner, self._path, self._allow_pickle, self._safe_globals)
        try:
            return self._reader.read_data(plan, cast(LoadPlanner, guarded))
        except Exception as error:  # torch may raise anything for hostile bytes
            if isinstance(error, (StagerError, OSError)) or error is guarded.error:
                raise
            raise CorruptCheckpointError(self._path, f"is damaged: its content cannot be parsed ({error!r})") from error

    def _check_tensors(self, plan: LoadPlan, metadata: Metadata) -> None:
        """Check files and archives before torch opens them: it would open a FIFO, too, and unpack an archive to any size."""
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(metadata.storage_data[item.storage_index].relative_path, []).append(item)
        for name, items in by_file.items():
            path = os.path.join(self._path, name)
            with storage_errors("read", path):
                fd = open_regular(path)
            try:
                for item in items:
                    if item.type != LoadItemType.BYTE_IO:
                        info = metadata.storage_data[item.storage_index]
                        window = io.BufferedReader(_Window(fd, info.offset, info.length))
                        check_archive(window, info.length, item.storage_index.fqn, path)
            finally:
                os.close(fd)


class _Window(io.RawIOBase):
    """The ``nbytes`` bytes of an open file that begin at ``start``, as a file of their own."""

    def __init__(self, fd: int, start: int, nbytes: int) -> None:
        self._fd = fd
        self._start = start
        self._nbytes = nbytes
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._nbytes}[whence]
        if base + offset < 0:
            raise ValueError(f"cannot seek to {base + offset}, before the start of the file")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        left = max(0, min(len(buffer), self._nbytes - self._position))
        data = os.pread(self._fd, left, self._start + self._position)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


class _GuardedPlanner:
    """A planner that loads an object only if the ``weights_only`` rules or the user allow it.

    Attributes:
        error: what the wrapped planner raised.
    """

    def __init__(self, planner: LoadPlanner, path: str, allow_pickle: bool, safe_globals: Sequence[str]) -> None:
        self._path = path
        self._allow_pickle = allow_pickle
        self._safe_globals = safe_globals
        self._planner = planner
        self.error: Exception | None = None

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        blob, allowed = value.getvalue(), self._allow_pickle
        self._ask(hand_over_object, self._planner, read_item, blob, self._path, allowed, self._safe_globals)

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        tensor: torch.Tensor = self._ask(self._planner.resolve_tensor, read_item)
        return tensor

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        self._ask(self._planner.commit_tensor, read_item, tensor)

    def _ask(self, method: Callable[..., Any], *args: Any) -> Any:
        try:
            return method(*args)
        except Exception as error:
            self.error = error
            raise
