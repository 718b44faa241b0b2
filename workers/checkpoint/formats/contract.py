"""The contract of an on-disk format. Partition, hashes, receipts, commit and reading are the same for all formats.

    trainer   lay_out            tensors -> items and files, before the first byte is written; kept as long as the plan
              templates          the tensors' items -> bytes that only torch can make; made once, sent to the workers
              object_blob        a value -> the bytes of its item
              trailer            the objects' blobs -> the blob that ends the file, for a format that needs one
    worker    headers_and_tails  an item -> the bytes before and after its raw bytes
    commit    index_files        small files that readers of the format start from

All bytes follow from the layout and the templates, so trainer and workers compute the same ones. Workers run without
torch: importing it takes more than a second, and more memory than everything else they need. A function that needs torch
(those of the trainer, and making templates for a layout that came without) imports it when it is called.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, overload

from stager.workers.checkpoint.layout.items import Item, ItemKind, Items
from stager.workers.checkpoint.layout.layout import FileSpec, Layout, Templates, itemsize_of
from stager.workers.checkpoint.layout.structure import Path, describe

if TYPE_CHECKING:
    from stager.workers.checkpoint.formats.object_pickle import PickledObject
    from stager.workers.checkpoint.layout.layout_plan import LayoutPlan

SMALLEST_FILE_BYTES = 1 << 20  # a smaller file costs more time than a second writer saves

Split = Callable[["TensorSpecs", Sequence[int]], Sequence[Sequence[int]]]
"""From tensors, and the bytes that each takes, to files: the indices of each file's tensors. No file is empty."""

HeadersAndTails = Callable[[int], tuple[bytes, bytes]]
"""From an item's index to the bytes before and after its raw bytes; ``(b"", b"")`` if it is not a tensor."""

Trailer = Callable[[Sequence[bytes]], Sequence[bytes]]
"""From the objects' blobs to the blobs that follow them: one, an item of kind "frame" (a trailer); or none."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor that will be an item.

    Attributes:
        paths: its key paths in the state; more than one if it is tied.
        names: its names in the checkpoint, in the same order.
        dtype, shape, stride: as in :class:`stager.workers.checkpoint.layout.layout.Item`.
    """

    paths: tuple[Path, ...]
    names: tuple[str, ...]
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Number of its raw bytes."""
        return math.prod(self.shape) * itemsize_of(self.dtype)

    def describe(self) -> str:
        """Return its first key path as a user would write it."""
        return describe(self.paths[0])

    def item(self, file: int, offset: int, head: int, tail: int = 0) -> Item:
        """Make its item. The blob starts at ``offset``; header and tail have ``head`` and ``tail`` bytes."""
        data = self.nbytes
        place = file, offset, head + data + tail, offset + head, data
        return Item("tensor", *place, self.dtype, self.shape, self.stride)


@dataclass(frozen=True, slots=True)
class TensorSpecs(Sequence[TensorSpec]):
    """Tensors that will be items, in columns.

    Attributes:
        kinds: the different dtypes, shapes and strides, as kinds of items.
        codes: for each tensor, the position of its kind in ``kinds``; an array of numpy's.
        spec: makes the spec of the tensor at an index.
    """

    kinds: Sequence[ItemKind]
    codes: Any
    spec: Callable[[int], TensorSpec]

    @staticmethod
    def of(specs: Sequence[TensorSpec]) -> TensorSpecs:
        """Put specs into columns."""
        import numpy as np  # late: the workers start without it

        kinds: dict[ItemKind, int] = {}
        codes = [kinds.setdefault(ItemKind("tensor", s.dtype, s.shape, s.stride), len(kinds)) for s in specs]
        return TensorSpecs(tuple(kinds), np.array(codes, dtype=np.int64), specs.__getitem__)

    def of_each(self, of_kind: Callable[[ItemKind], int]) -> Any:
        """Return a number for each tensor, which depends on its kind alone, as an array of numpy's."""
        import numpy as np  # late: as above

        return np.array([of_kind(kind) for kind in self.kinds] or [0], dtype=np.int64)[self.codes]

    @overload
    def __getitem__(self, index: int) -> TensorSpec: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[TensorSpec]: ...

    def __getitem__(self, index: int | slice) -> TensorSpec | Sequence[TensorSpec]:
        if isinstance(index, slice):
            return list(map(self.spec, range(len(self))[index]))
        return self.spec(range(len(self))[index])

    def __len__(self) -> int:
        return len(self.codes)


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """Where a format puts tensors.

    Attributes:
        order: of each item, the index of its tensor among those that were given.
        items: in file order; without places in a slab.
        files: the files that contain them.
    """

    order: Sequence[int]
    items: Items
    files: tuple[FileSpec, ...]


class Format(ABC):
    """An on-disk format. What most formats need not do is done here: nothing.

    Attributes:
        row_major: tensors are stored in C order, whatever their strides were.
        one_file: everything is in one file. A change anywhere changes that file, so there are no incremental saves.
        has_recipes: mappings with a class or keys of their own, and tensors made of tensors, are stored as their parts
            and a recipe. A format whose readers know the whole structure stores them as objects.
        has_chunks: a tensor may be stored in chunks.
    """

    row_major = False
    one_file = False
    has_recipes = True
    has_chunks = True

    def holds(self, dtype: str) -> bool:
        """Return whether tensors of this dtype are stored as tensors; the others are stored as objects."""
        return True

    @abstractmethod
    def lay_out(self, tensors: TensorSpecs, rank: int, split: Split) -> TensorLayout:
        """Decide where each tensor goes.

        Args:
            rank: of the trainer process; part of the file names.
            split: which tensors share a file, if the format has more than one file.

        Raises:
            UnstageableError: the format cannot hold a tensor; the error names its key path.
        """

    def templates(self, kinds: Iterable[ItemKind]) -> Templates:
        """Make the bytes that only torch can make, for tensors of these kinds. Needs torch."""
        return {}

    @abstractmethod
    def headers_and_tails(self, layout: Layout) -> HeadersAndTails:
        """Return the function that gives the bytes around an item's raw bytes."""

    def object_blob(self, value: object, leaf: int = 0) -> PickledObject:
        """Pickle an object. ``leaf`` is unique in the state, and the same in every save of it. Needs torch."""
        from stager.workers.checkpoint.formats.object_pickle import pickle_object

        return pickle_object(value, leaf)

    @abstractmethod
    def object_file_name(self, rank: int) -> str:
        """Return the name of the objects' file. If it is the last tensor file's, objects go to the end of that file."""

    def trailer(self, plan: LayoutPlan) -> Trailer:
        """Return the function that makes the trailer. By default a file ends with its last object."""
        return lambda blobs: ()

    def index_files(self, layout: Layout, save_id: str, directory: str) -> dict[str, bytes]:
        """Return the bytes of each index file, by name. ``directory`` is the final path of the checkpoint."""
        return {}


def nbytes_of(kind: ItemKind) -> int:
    """Return the number of raw bytes of a tensor of a kind."""
    return math.prod(kind.shape) * itemsize_of(kind.dtype)


def evenly(num_files: int) -> Split:
    """Split tensors into at most ``num_files`` runs of about the same number of bytes."""

    def split(tensors: TensorSpecs, sizes: Sequence[int]) -> Sequence[Sequence[int]]:
        import numpy as np  # late: the workers start without it

        nbytes = np.asarray(sizes, dtype=np.int64)
        total = int(nbytes.sum())
        count = max(1, min(num_files, total // SMALLEST_FILE_BYTES))
        # A file ends behind the tensor with which its share of the bytes is reached.
        before = np.cumsum(nbytes) - nbytes
        file = np.minimum(before * count // max(1, total), count - 1)
        starts = [*np.flatnonzero(np.diff(file, prepend=-1)).tolist(), len(nbytes)]
        return [range(start, end) for start, end in pairwise(starts)]

    return split
