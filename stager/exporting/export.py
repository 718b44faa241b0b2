"""From a committed checkpoint, whatever its format and however many files it has, to one ``.pt`` or ``.safetensors`` file.

objects   read, unpickled under weights_only, pickled again for the file
plan      the layout of the file, by the format that the workers write (workers/checkpoint/formats)
stream    tensors one after the other, each hash checked on the way, a chunk in memory at a time
commit    synced, and only then given its name
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from stager.exporting.output import new_file
from stager.exporting.source import Contents, Part, Runs, Source, contents_of, is_c_order, runs_of
from stager.exporting.stream import ItemStream
from stager.loading.pickles.unpickle import unpickle
from stager.workers.checkpoint.directory import files
from stager.workers.checkpoint.directory.manifest import Manifest, read_manifest
from stager.workers.checkpoint.directory.read_lock import reading
from stager.workers.checkpoint.formats import Format, get_format, safetensors_format
from stager.workers.checkpoint.formats.contract import TensorSpec, evenly
from stager.workers.checkpoint.layout.dtypes import dtype_of, new_tensor
from stager.workers.checkpoint.layout.layout import Item, Layout, align, contiguous_stride
from stager.workers.checkpoint.layout.layout_plan import LayoutPlan
from stager.workers.checkpoint.layout.structure import Node, describe, map_leaves, names_of
from stager.workers.errors import MemoryBudgetError, UnstageableError, UsageError
from stager.workers.memory.pages import bytes_at

FORMATS = ("torch", "safetensors")

_CHUNK_BYTES = 8 << 20
_SMALLEST_BUDGET_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Exported:
    """A checkpoint that was exported to one file.

    Attributes:
        path, nbytes: the file.
        format: its format.
        step: of the checkpoint.
        num_tensors, num_objects: in the file.
        left_out: objects that the format has no place for, as a user would write them.
        secs: how long it took.
    """

    path: str
    nbytes: int
    format: str
    step: int
    num_tensors: int
    num_objects: int
    left_out: tuple[str, ...]
    secs: float


def export_checkpoint(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    file_format: str = "torch",
    max_memory_bytes: int = 1 << 30,
    allow_pickle: bool = False,
    force: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Exported:
    """Write one file that ``torch.load`` or ``safetensors.torch.load_file`` reads.

    Args:
        checkpoint: its directory (``.../step-00000100``).
        out: the file; it appears when it is whole.
        file_format: "torch": the nested state. "safetensors": the tensors by their names (keys joined by dots); objects
            are left out, and listed in the result.
        max_memory_bytes: for data in memory, beside the manifest. Only tensors that change their memory layout and
            pickled objects need to be there as a whole.
        allow_pickle: unpickle any object (runs code from the checkpoint).
        force: replace ``out``.
        progress: called with the number of bytes just read.

    Raises:
        CheckpointNotFoundError, CorruptCheckpointError, StorageError: nothing is at ``out``.
        UnsafePickleError: see ``allow_pickle``.
        UnstageableError: the format cannot hold a tensor; names it.
        MemoryBudgetError: something does not fit ``max_memory_bytes``.
        UsageError: ``out`` exists, or an unknown format.
    """
    started = time.monotonic()
    if file_format not in FORMATS:
        raise UsageError(f"unknown format {file_format!r}; known: {', '.join(FORMATS)}")
    if max_memory_bytes < _SMALLEST_BUDGET_BYTES:
        raise UsageError(f"max_memory is {max_memory_bytes:,} bytes; it takes at least {_SMALLEST_BUDGET_BYTES:,}")
    checkpoint, out = os.path.abspath(os.fspath(checkpoint)), os.path.abspath(os.fspath(out))
    with reading(checkpoint):
        manifest = read_manifest(checkpoint)
        chunk_bytes = min(_CHUNK_BYTES, max_memory_bytes // 4)
        stream = ItemStream(checkpoint, manifest, chunk_bytes, progress or (lambda nbytes: None))
        try:
            export = _Export(checkpoint, manifest, stream, file_format, max_memory_bytes - chunk_bytes, allow_pickle)
            with new_file(out, force=force) as fd:
                export.write(fd)
        finally:
            stream.close()
    return Exported(
        path=out,
        nbytes=os.stat(out).st_size,
        format=file_format,
        step=manifest.header.step,
        num_tensors=len(export.contents.tensors),
        num_objects=len(export.contents.objects) - len(export.left_out),
        left_out=export.left_out,
        secs=time.monotonic() - started,
    )


class _Export:
    def __init__(
        self,
        path: str,
        manifest: Manifest,
        stream: ItemStream,
        file_format: str,
        budget_bytes: int,
        allow_pickle: bool,
    ) -> None:
        self._path = path
        self._items = manifest.layout.items
        self._segment_bytes = manifest.layout.segment_bytes
        self._stream = stream
        self._format: Format = get_format(file_format)
        self._budget_bytes = budget_bytes
        self._allow_pickle = allow_pickle
        self.contents: Contents = contents_of(manifest)
        names = tuple(map(describe, self.contents.object_paths))
        self.left_out = names if file_format == "safetensors" else ()
        self._blobs = [] if file_format == "safetensors" else self._read_objects()
        self._layout, self._sources = self._plan()

    def _read_objects(self) -> list[bytes]:
        """As the file has them; held until the end."""
        blobs = []
        left = self._budget_bytes
        for number, (index, path) in enumerate(zip(self.contents.objects, self.contents.object_paths, strict=True)):
            name = describe(path)
            left -= 4 * self._items[index].nbytes  # its blob, its value, its new blob, and that in data.pkl
            if left < 0:
                raise MemoryBudgetError(
                    f"{name}: the pickled objects do not fit {self._budget_bytes:,} bytes; raise max_memory"
                )
            value = unpickle(b"".join(map(bytes, self._stream.data(index))), name, self._path, self._allow_pickle)
            try:
                blobs.append(self._format.object_blob(value, number).blob)
            except Exception as error:
                raise UnstageableError(name, f"cannot be pickled again: {error}") from error
        return blobs

    def _plan(self) -> tuple[Layout, list[Source]]:
        """The file's layout, and the source of each of its tensors."""
        sources = self.contents.tensors
        for source in sources:
            if not self._format.holds(source.dtype):
                raise UnstageableError(
                    source.name,
                    f"has dtype {source.dtype}, which this format cannot store; "
                    "convert the tensor, or export to another format",
                )
        laid_out = self._format.lay_out([self._spec(source) for source in sources], 0, evenly(1))
        order: dict[Node, int] = {number: place for place, number in enumerate(laid_out.order)}
        structure = map_leaves(self.contents.structure, lambda n: order.get(n, n))
        plan = LayoutPlan(
            laid_out.files, self._format.object_file_name(0), laid_out.items, structure, self._segment_bytes
        )
        self._blobs += self._format.trailer(plan)(self._blobs)
        file, offset = plan.object_place
        items = []
        for number, blob in enumerate(self._blobs):
            kind = "object" if number < len(self.contents.objects) else "frame"
            items.append(Item(kind, file, offset, len(blob), offset, len(blob), "", (), ()))
            offset = align(offset + len(blob))
        return plan.with_objects(items), [sources[number] for number in laid_out.order]

    def _spec(self, source: Source) -> TensorSpec:
        stride = contiguous_stride(source.shape) if self._format.row_major else source.stride
        return TensorSpec(tuple(source.paths), tuple(names_of(source.paths)), source.dtype, source.shape, stride)

    def write(self, fd: int) -> None:
        if not self._layout.files:  # safetensors of a state without tensors
            files.write_all(fd, [safetensors_format.header([])], 0)
            return
        os.ftruncate(fd, self._layout.files[0].nbytes)
        frame = self._format.headers_and_tails(self._layout)
        for index, item in enumerate(self._layout.items):
            if item.kind != "tensor":
                files.write_all(fd, [self._blobs[index - len(self._sources)]], item.offset)
                continue
            head, tail = frame(index)
            files.write_all(fd, [head], item.offset)
            files.write_all(fd, [tail], item.data_offset + item.data_nbytes)
            for part in self._sources[index].parts:
                self._write_part(fd, item, part)

    def _write_part(self, fd: int, target: Item, part: Part) -> None:
        source = self._items[part.item]
        if (target.shape, target.stride) == (source.shape, source.stride):
            self._copy(fd, target.data_offset, Runs(max(1, source.data_nbytes), (), (), 0), part.item)
            return
        runs = runs_of(target.shape, source.shape, part.offsets, source.dtype)
        if is_c_order(source.shape, source.stride):
            self._copy(fd, target.data_offset, runs, part.item)
        else:
            dense = self._in_c_order(part, source)
            _put(fd, target.data_offset, runs, 0, bytes_at(dense.data_ptr(), source.data_nbytes))

    def _copy(self, fd: int, offset: int, runs: Runs, index: int) -> None:
        position = 0
        for data in self._stream.data(index):
            _put(fd, offset, runs, position, data)
            position += len(data)

    def _in_c_order(self, part: Part, source: Item) -> torch.Tensor:
        """The values of an item with other strides: as a whole in memory."""
        if 2 * source.data_nbytes > self._budget_bytes:
            name = next(s.name for s in self._sources if part in s.parts)
            raise MemoryBudgetError(
                f"{name}: is stored with strides {list(source.stride)}; bringing it into C order takes "
                f"{2 * source.data_nbytes:,} bytes of memory, and {self._budget_bytes:,} are left of max_memory: raise it"
            )
        tensor = new_tensor(dtype_of(source.dtype), source.shape, source.stride, source.data_nbytes)
        view, position = bytes_at(tensor.data_ptr(), source.data_nbytes), 0
        for data in self._stream.data(part.item):
            view[position : position + len(data)] = data
            position += len(data)
        return tensor.contiguous()


def _put(fd: int, offset: int, runs: Runs, position: int, data: memoryview) -> None:
    """Write ``data``, which is at ``position`` of a part, to where it is in the whole, which starts at ``offset``."""
    while data:
        run, within = divmod(position, runs.nbytes)
        count = min(len(data), runs.nbytes - within)
        files.write_all(fd, [data[:count]], offset + runs.place(run) + within)
        data, position = data[count:], position + count
