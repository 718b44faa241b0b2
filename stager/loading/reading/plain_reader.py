"""Reading the raw bytes of a checkpoint without checking hashes: to rescue what a damaged one still holds."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import torch

from stager.workers.checkpoint.documents.manifest import Manifest
from stager.workers.checkpoint.read.blob_reader import Target
from stager.workers.checkpoint.storage.posix.files import open_regular, storage_errors
from stager.workers.errors import CorruptCheckpointError
from stager.workers.memory.pages import bytes_at

_GROUP_BYTES = 8 << 20

_Read = tuple[int, int, memoryview]
"""An item, where to begin among its raw bytes, and the memory for what is read."""


class PlainReader:
    """Reads as ``BlobReader`` does (``workers/checkpoint/read``), but checks neither headers nor hashes."""

    def __init__(self, path: str, manifest: Manifest, num_threads: int) -> None:
        self._items = manifest.layout.items
        self._num_threads = num_threads
        self._paths = [os.path.join(path, file.name) for file in manifest.layout.files]
        self._fds: list[int] = []
        with ExitStack() as undo:
            undo.callback(self.close)
            for name in self._paths:
                with storage_errors("open", name):
                    self._fds.append(open_regular(name))
            undo.pop_all()

    def read(self, indices: Sequence[int], targets: Sequence[Target]) -> None:
        """Read items into their targets. Each must have exactly ``data_nbytes`` bytes, and none may be a sink.

        Raises:
            CorruptCheckpointError: a file ends early.
            StorageError: a read failed.
        """
        wholes = [(index, 0, self._view(index, target)) for index, target in zip(indices, targets, strict=True)]
        self._read_in_threads(wholes)

    def read_parts(self, indices: Sequence[int], starts: Sequence[int], targets: Sequence[torch.Tensor]) -> None:
        """Read parts of items into tensors, which are contiguous.

        Args:
            starts: where the part begins among the raw bytes of each item.

        Raises:
            CorruptCheckpointError, StorageError: as :meth:`read`.
        """
        views = [bytes_at(target.data_ptr(), target.nbytes) for target in targets]
        self._read_in_threads(list(zip(indices, starts, views, strict=True)))

    def _view(self, index: int, target: Target) -> memoryview:
        view = bytes_at(target, self._items[index].data_nbytes) if isinstance(target, int) else target
        assert isinstance(view, memoryview), "sinks take bytes that were checked"
        return view

    def _read_in_threads(self, reads: Iterable[_Read]) -> None:
        groups = self._group(reads)
        if len(groups) < 2 or self._num_threads == 1:
            for group in groups:
                self._read_all(group)
            return
        with ThreadPoolExecutor(self._num_threads, thread_name_prefix="stager-read") as executor:
            list(executor.map(self._read_all, groups))

    def _group(self, reads: Iterable[_Read]) -> list[list[_Read]]:
        """Divide the items into groups of about ``_GROUP_BYTES``; a thread reads one group at a time."""
        groups: list[list[_Read]] = []
        nbytes = _GROUP_BYTES
        for read in reads:
            size = len(read[-1])
            if nbytes + size > _GROUP_BYTES:
                groups.append([])
                nbytes = 0
            groups[-1].append(read)
            nbytes += size
        return groups

    def _read_all(self, group: list[_Read]) -> None:
        for read in group:
            self._read(*read)

    def _read(self, index: int, start: int, view: memoryview) -> None:
        item = self._items[index]
        position = item.data_offset + start
        with storage_errors("read", self._paths[item.file]):
            while view:
                count = os.preadv(self._fds[item.file], [view], position)
                if count == 0:
                    raise CorruptCheckpointError(
                        self._paths[item.file], f"is cut short: it ends at byte {position}, in the middle of a value"
                    )
                view, position = view[count:], position + count

    def close(self) -> None:
        """Close the files."""
        while self._fds:
            os.close(self._fds.pop())
