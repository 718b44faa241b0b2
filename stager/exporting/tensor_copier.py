"""Copying a tensor from a checkpoint into a file, a chunk at a time; one that is stored with other strides, as a whole."""

from __future__ import annotations

import threading
from collections.abc import Iterable

import torch

from stager.exporting.conversion import converted
from stager.exporting.output import Runs, runs_of
from stager.exporting.source import Source
from stager.workers.checkpoint.layout.dtypes import dtype_of, new_tensor
from stager.workers.checkpoint.layout.items import Item
from stager.workers.checkpoint.layout.layout import contiguous_stride, itemsize_of
from stager.workers.errors import MemoryBudgetError
from stager.workers.memory.pages import bytes_at


class TensorCopier:
    """Copies tensors of one checkpoint. Several threads may copy at a time.

    Args:
        source: the checkpoint.
        budget_bytes: memory for a tensor that has to be in memory as a whole; there is one such tensor at a time.
    """

    def __init__(self, source: Source, budget_bytes: int) -> None:
        self._source = source
        self._budget_bytes = budget_bytes
        self._one_whole = threading.Lock()

    def copy(self, number: int, fd: int, target: Item) -> None:
        """Write a tensor of the checkpoint into a file.

        Args:
            number: of the tensor, in the source.
            target: where its bytes go in the file, and with which dtype and strides. If its dtype is another one than in
                the checkpoint, the values are converted.

        Raises:
            CorruptCheckpointError, StorageError
            MemoryBudgetError: the tensor has to be in memory as a whole, and does not fit.
            UnstageableError: a value is too large for the dtype of the target.
        """
        for offsets, part in self._source.parts(number):
            stored = self._source.items[part]
            if (target.dtype, target.shape, target.stride) == (stored.dtype, stored.shape, stored.stride):
                Runs(max(1, stored.data_nbytes)).write(fd, target.data_offset, self._source.data(part))
                continue
            runs = runs_of(target.shape, stored.shape, offsets, itemsize_of(target.dtype))
            if _is_c_order(stored):
                runs.write(fd, target.data_offset, self._in_dtype(number, stored, target, self._source.data(part)))
                continue
            with self._one_whole:
                dense = self._in_c_order(number, part)
                data = [bytes_at(dense.data_ptr(), stored.data_nbytes)]
                runs.write(fd, target.data_offset, self._in_dtype(number, stored, target, data))

    def read(self, part: int) -> torch.Tensor:
        """Read a stored item as a whole."""
        stored = self._source.items[part]
        tensor = new_tensor(dtype_of(stored.dtype), stored.shape, stored.stride, stored.data_nbytes)
        view, position = bytes_at(tensor.data_ptr(), stored.data_nbytes), 0
        for piece in self._source.data(part):
            view[position : position + len(piece)] = piece
            position += len(piece)
        return tensor

    def _in_dtype(self, number: int, stored: Item, target: Item, data: Iterable[memoryview]) -> Iterable[memoryview]:
        if stored.dtype == target.dtype:
            return data
        return converted(data, dtype_of(stored.dtype), dtype_of(target.dtype), self._source.name(number))

    def _in_c_order(self, number: int, part: int) -> torch.Tensor:
        """Read an item with other strides as a whole, and bring it into C order."""
        stored = self._source.items[part]
        if 2 * stored.data_nbytes > self._budget_bytes:
            raise MemoryBudgetError(
                f"{self._source.name(number)}: is stored with strides {list(stored.stride)}; bringing it into C order takes "
                f"{2 * stored.data_nbytes:,} bytes of memory, and max_memory leaves {self._budget_bytes:,}; raise max_memory"
            )
        return self.read(part).contiguous()


def _is_c_order(item: Item) -> bool:
    steps = zip(item.shape, item.stride, contiguous_stride(item.shape), strict=True)
    return 0 in item.shape or all(length == 1 or stride == dense for length, stride, dense in steps)
