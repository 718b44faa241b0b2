"""From a committed checkpoint, whatever its format and however many files it has, to one ``.pt`` or ``.safetensors`` file.

1. Take the part that is asked for (``part.py``), and lay out its tensors, by the format that workers write
   (``workers/checkpoint/formats``).
2. Read each object, unpickle it under the ``weights_only`` rules, and pickle it again for the file. What a recipe makes is
   an object, too (``whole.py``). This comes before the first write, because the sizes of the objects complete the layout.
3. Copy the tensors, one after the other. A chunk is in memory at a time, and each hash is checked on the way.
4. Sync the file, and only then give it its name.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any, SupportsIndex

import torch

from stager.config.arguments import as_bytes, as_step
from stager.config.calls import explained
from stager.exporting.file_format import format_of
from stager.exporting.output import new_file, refuse_directory
from stager.exporting.part import Part
from stager.exporting.source import Source, chosen_checkpoint, opening
from stager.exporting.tensor_copier import TensorCopier
from stager.exporting.whole import Folded
from stager.loading.pickles.unpickle import unpickle
from stager.workers.checkpoint.directory.manifest_file import read_manifest
from stager.workers.checkpoint.directory.reading import reading
from stager.workers.checkpoint.formats import get_format, safetensors_format
from stager.workers.checkpoint.formats.contract import TensorSpec, TensorSpecs, evenly
from stager.workers.checkpoint.formats.torch_settings import torch_defaults
from stager.workers.checkpoint.layout.building import build
from stager.workers.checkpoint.layout.dtypes import dtype_of, new_tensor
from stager.workers.checkpoint.layout.items import Item
from stager.workers.checkpoint.layout.layout import Layout, align, contiguous_stride
from stager.workers.checkpoint.layout.layout_plan import LayoutPlan
from stager.workers.checkpoint.layout.structure import Path, map_leaves, names_of, walk
from stager.workers.checkpoint.storage.paths import local_path, place_path
from stager.workers.checkpoint.storage.posix import files
from stager.workers.errors import MemoryBudgetError, UnstageableError, UsageError
from stager.workers.faults import point

_CHUNK_BYTES = 8 << 20
_SMALLEST_BUDGET_BYTES = 1 << 20
_SEGMENT_BYTES = 1 << 20  # a layout needs it; nobody hashes the exported file


@dataclass(frozen=True, slots=True)
class Exported:
    """A checkpoint that was exported to one file: the file, what is in it, and how long the export took.

    Attributes:
        left_out: objects that the format has no place for, as a user would write them.
    """

    path: str
    nbytes: int
    format: str
    step: int
    num_tensors: int
    num_objects: int
    left_out: tuple[str, ...]
    secs: float


@explained('export_checkpoint("runs/gpt", "model.pt")')
def export_checkpoint(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    step: SupportsIndex | None = None,
    keys: str | Sequence[str] | None = None,
    strip_prefix: str | None = None,
    file_format: str | None = None,
    max_memory_bytes: int | str = 1 << 30,
    allow_pickle: bool = False,
    force: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Exported:
    """Write one file that ``torch.load`` or ``safetensors.torch.load_file`` reads.

    In a ``.pt`` file, a container with a class of its own and a tensor that is made of others are one pickled object each.

    Args:
        checkpoint: its directory (``.../step-00000100``), or that of the run.
        out: the file; it appears when it is whole.
        step: which checkpoint of the run; None: the newest. The result has the step.
        keys: export only what matches this pattern, or one of these, as for ``load()``: ``"model"`` is all that is in the
            model. None: all of the checkpoint.
        strip_prefix: names lose it if they begin with it. With ``keys="model"``, ``"model."`` makes a file of the
            model's weights alone, which ``model.load_state_dict()`` takes. None: names stay as they are.
        file_format: "torch": the nested state. "safetensors": the tensors by their names (keys joined by dots). It has no
            place for objects; the result lists them. None: by the ending of ``out`` (.pt, .pth, .bin, .ckpt: torch;
            .safetensors: safetensors).
        max_memory_bytes: for data in memory, beside the manifest; or text such as "1GiB". Pickled objects, and each tensor
            that changes its memory layout, must fit as a whole, as must a container with a class of its own.
        allow_pickle: unpickle any object (runs code from the checkpoint).
        force: replace ``out``.
        progress: called with the number of bytes just read.

    Raises:
        CheckpointNotFoundError, CorruptCheckpointError, StorageError: ``out`` was not changed.
        UnsafePickleError: see ``allow_pickle``.
        UnstageableError: the format cannot hold a tensor, or an object cannot be pickled; names it.
        MemoryBudgetError: something does not fit ``max_memory_bytes``.
        StateMismatchError: a pattern of ``keys`` matches nothing, or no name begins with ``strip_prefix``.
        UsageError: ``out`` exists; or the format is unknown, or contradicts the ending of ``out``; or ``step`` is given, and
            ``checkpoint`` is no run.
    """
    started = time.monotonic()
    checkpoint, out = place_path(checkpoint, "checkpoint"), local_path(out, "out")
    refuse_directory(out)
    file_format = format_of(out, file_format)
    part = Part.of_arguments(keys, strip_prefix)
    budget_bytes = as_bytes(max_memory_bytes, "max_memory_bytes")
    if budget_bytes < _SMALLEST_BUDGET_BYTES:
        raise UsageError(f"max_memory_bytes is {budget_bytes:,} bytes; it must be at least {_SMALLEST_BUDGET_BYTES:,}")
    checkpoint = chosen_checkpoint(checkpoint, None if step is None else as_step(step))
    with reading(checkpoint), ExitStack() as opened:
        manifest = read_manifest(checkpoint)
        point("export.manifest")
        chunk_bytes = min(_CHUNK_BYTES, budget_bytes // 4)
        with opening(checkpoint, manifest):
            progress = progress or (lambda nbytes: None)
            source = opened.enter_context(closing(Source(checkpoint, manifest, part, chunk_bytes, progress)))
        with torch_defaults():
            export = _Export(checkpoint, source, file_format, budget_bytes - chunk_bytes, allow_pickle)
            layout = export.lay_out()
        with new_file(out, force=force) as fd:
            export.write(layout, fd)
    return Exported(
        path=out,
        nbytes=os.stat(out).st_size,
        format=file_format,
        step=manifest.header.step,
        num_tensors=len(source.tensors),
        num_objects=len(export.objects),
        left_out=() if export.objects else source.names_of_objects(),
        secs=time.monotonic() - started,
    )


class _Export:
    """One export: :meth:`lay_out`, then :meth:`write`.

    Attributes:
        objects: item numbers of the objects that go into the file.
    """

    def __init__(self, path: str, source: Source, file_format: str, budget_bytes: int, allow_pickle: bool) -> None:
        self._path = path
        self._source = source
        self._copier = TensorCopier(source, budget_bytes)
        self._format = get_format(file_format)
        self._budget_bytes = budget_bytes
        self._allow_pickle = allow_pickle
        self._folded = Folded(source, self._unpickle) if file_format == "torch" else None
        self.objects = [] if self._folded is None else self._folded.objects
        self._names: dict[Path, str] = {}
        self._tensors: list[int] = []  # item numbers, in the order of the file
        self._blobs: list[bytes] = []  # of the objects, then the trailer

    def lay_out(self) -> Layout:
        """Do steps 1 and 2."""
        source, folded = self._source, self._folded
        structure, tensors = (
            (source.structure, source.tensors) if folded is None else (folded.structure, folded.tensors)
        )
        for number in tensors:
            if not self._format.holds(source.items[number].dtype):
                raise UnstageableError(
                    source.name(number),
                    f"has dtype {source.items[number].dtype}, which this format cannot store; "
                    "convert the tensor, or export to another format",
                )
        paths = [path for number in tensors for path in source.paths[number]]
        self._names = dict(zip(paths, names_of(paths), strict=True))
        laid_out = self._format.lay_out(TensorSpecs.of(list(map(self._spec, tensors))), 0, evenly(1))
        self._tensors = [tensors[place] for place in laid_out.order]
        objects = source.objects if folded is None else folded.objects
        leaves: dict[Any, int] = {number: leaf for leaf, number in enumerate([*self._tensors, *objects])}
        structure = map_leaves(structure, leaves.__getitem__)
        object_file = self._format.object_file_name(0)
        plan = LayoutPlan(laid_out.files, object_file, laid_out.items, structure, _SEGMENT_BYTES)
        self._blobs = self._read_objects()
        self._blobs += self._format.trailer(plan)(self._blobs)
        file, offset = plan.object_place
        items = []
        for position, blob in enumerate(self._blobs):
            kind = "object" if position < len(self.objects) else "frame"
            items.append(Item(kind, file, offset, len(blob), offset, len(blob), "", (), ()))
            offset = align(offset + len(blob))
        return plan.with_objects(items)

    def _spec(self, number: int) -> TensorSpec:
        item = self._source.items[number]
        stride = contiguous_stride(item.shape) if self._format.row_major else item.stride
        paths = self._source.paths[number]
        return TensorSpec(tuple(paths), tuple(self._names[path] for path in paths), item.dtype, item.shape, stride)

    def _read_objects(self) -> list[bytes]:
        """Return the objects' blobs as the file has them. They stay in memory until the end."""
        blobs: list[bytes] = []
        left = self._budget_bytes
        if self._folded is None:
            return blobs
        for position, number in enumerate(self.objects):
            name = self._folded.name(number)
            left -= self._folded.nbytes(number)
            if left < 0:
                raise MemoryBudgetError(
                    f"{name}: the pickled objects up to this one do not fit into {self._budget_bytes:,} bytes; "
                    "raise max_memory"
                )
            value = self._whole(number) if number in self._folded.nodes else self._unpickle(number)
            try:
                blobs.append(self._format.object_blob(value, position).blob)
            except Exception as error:
                raise UnstageableError(name, f"cannot be pickled again: {error}") from error
        return blobs

    def _unpickle(self, number: int) -> Any:
        source = self._source
        return unpickle(b"".join(map(bytes, source.data(number))), source.name(number), self._path, self._allow_pickle)

    def _whole(self, number: int) -> Any:
        """Build a container with a recipe."""
        assert self._folded is not None
        node, path = self._folded.nodes[number]
        values: dict[int, Any] = {}
        for _, index in walk(node, path):
            if index not in values:
                is_tensor = self._source.items[index].kind == "tensor"
                values[index] = self._tensor(index) if is_tensor else self._unpickle(index)
        return build(node, values.__getitem__, path)

    def _tensor(self, number: int) -> torch.Tensor:
        """Read a tensor as a whole, with the strides that it has in the checkpoint."""
        ((first, part), *others) = self._source.parts(number)
        if not others and self._source.items[part].shape == self._source.items[number].shape:
            return self._copier.read(part)
        item = self._source.items[number]
        whole = new_tensor(dtype_of(item.dtype), item.shape, item.stride, item.data_nbytes)
        for offsets, index in ((first, part), *others):
            place = tuple(
                slice(start, start + length)
                for start, length in zip(offsets, self._source.items[index].shape, strict=True)
            )
            whole[place].copy_(self._copier.read(index))
        return whole

    def write(self, layout: Layout, fd: int) -> None:
        """Do step 3: tensors with what the format puts around them; then objects and trailer."""
        if not layout.files:  # safetensors of a state without tensors
            files.write_all(fd, [safetensors_format.header([])], 0)
            return
        os.ftruncate(fd, layout.files[0].nbytes)
        frame = self._format.headers_and_tails(layout)
        for index, (item, number) in enumerate(zip(layout.items, self._tensors, strict=False)):
            head, tail = frame(index)
            files.write_all(fd, [head], item.offset)
            files.write_all(fd, [tail], item.data_offset + item.data_nbytes)
            self._copier.copy(number, fd, item)
        for item, blob in zip(layout.items[len(self._tensors) :], self._blobs, strict=True):
            files.write_all(fd, [blob], item.offset)
