"""``.metadata``: the pickled ``Metadata`` that stock DCP starts from.

    1. trainer, once per plan: ``index_templates`` pickles a specimen of each kind of torch's dataclasses, with marks where
       specimens differ, and cuts it at the marks (``pickle_template.py``). It needs torch.
    2. worker, once per plan: ``_StemWriter`` fills in what stays the same from save to save.
    3. worker, at each commit: ``dcp_index`` fills in the places of the objects and the identity of the checkpoint.

Unpickled, the result equals the dataclasses that DCP itself would have pickled; a test compares them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from stager.workers.checkpoint.formats.pickle_template import (
    DICT_END,
    DICT_START,
    END,
    Strings,
    TemplateMaker,
    fill,
    integer,
    list_of,
    mark,
    number_mark,
    plain_string,
    tuple_of,
)
from stager.workers.checkpoint.layout.items import Item, ItemKind
from stager.workers.checkpoint.layout.layout import Layout, Templates
from stager.workers.checkpoint.layout.structure import Chunks, Path, is_recipe, leaves, names_of
from stager.workers.gc_pause import no_collection

# Templates by name, and what to fill in:
#   tensor <dtype> <dimensions>   a TensorStorageMetadata: its lengths, its list of chunks
#   chunk <dimensions>            a ChunkStorageMetadata: offsets, lengths
#   index <dimensions>            the MetadataIndex of a tensor: its name, offsets
#   index of an object            its MetadataIndex: its name
#   storage info                  a _StorageInfo: file name, offset, size
#   metadata                      the whole: three dictionaries, path of the checkpoint, id of the save


def tensor_name(of: ItemKind) -> str:
    """Name the template of a tensor's ``TensorStorageMetadata``."""
    return f"tensor {of.dtype} {len(of.shape)}"


def index_templates(tensors: Sequence[ItemKind]) -> Templates:
    """Make a template for each dtype and number of dimensions, and those that every ``.metadata`` needs. Needs torch."""
    from torch import Size
    from torch.distributed.checkpoint import metadata as dcp
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    from stager.workers.checkpoint.layout.dtypes import dtype_of

    kinds = {tensor_name(kind): (kind.dtype, len(kind.shape)) for kind in tensors}
    properties = {
        dtype: dcp.TensorProperties(dtype=dtype_of(dtype)) for dtype in {dtype for dtype, _ in kinds.values()}
    }
    chunk = dcp.ChunkStorageMetadata(Size([0]), Size([1]))
    prelude = [
        *(dcp.TensorStorageMetadata(each, Size([1]), [chunk]) for each in properties.values()),
        *(dcp.BytesStorageMetadata(), dcp.MetadataIndex("", Size((0,))), _StorageInfo("", 0, 0)),
    ]
    maker = TemplateMaker(prelude)
    marks: list[Any] = [mark(number) for number in range(5)]
    state, paths, storage, checkpoint_id, save_id = marks
    meta = dcp.StorageMeta(checkpoint_id=checkpoint_id, save_id=save_id)
    templates = {
        "start": (maker.start, maker.first_string.to_bytes(4, "little")),
        "metadata": maker.template(dcp.Metadata(state, paths, storage, meta), marks),
        "storage info": maker.template(_StorageInfo(*marks[:3]), marks[:3]),
        "object": maker.template(dcp.BytesStorageMetadata(), ()),
        "index of an object": maker.template(dcp.MetadataIndex(marks[0]), marks[:1]),
    }
    for name, (dtype, dims) in kinds.items():
        lengths, chunks = [number_mark(number) for number in range(dims)], marks[0]
        tensor = dcp.TensorStorageMetadata(properties[dtype], Size(lengths), chunks)
        templates[name] = maker.template(tensor, [*lengths, chunks])
    for dims in {dims for _, dims in kinds.values()}:
        numbers = [number_mark(number) for number in range(2 * dims)]
        offsets, lengths = numbers[:dims], numbers[dims:]
        templates[f"chunk {dims}"] = maker.template(dcp.ChunkStorageMetadata(Size(offsets), Size(lengths)), numbers)
        index = dcp.MetadataIndex(marks[0], Size(offsets))
        templates[f"index {dims}"] = maker.template(index, [marks[0], *offsets])
    return templates


def dcp_index(layout: Layout, templates: Templates, save_id: str, directory: str) -> bytes:
    """Make ``.metadata``.

    Args:
        templates: from :func:`index_templates`.
        directory: the final path of the checkpoint.
    """
    stem = layout.cache.once_per_plan("dcp index", lambda: _StemWriter(layout, templates).write())
    pieces = [stem.before]
    for index, key in stem.objects:
        pieces += (key, _storage_info(templates, layout, layout.items[index]))
    pieces.append(fill(stem.ids, (plain_string(directory), plain_string(save_id))))
    return b"".join(pieces)


def _storage_info(templates: Templates, layout: Layout, item: Item) -> bytes:
    """Return the ``_StorageInfo`` that says where an item is."""
    file = plain_string(layout.files[item.file].name)
    return fill(templates["storage info"], (file, integer(item.offset), integer(item.nbytes)))


class _Stem(NamedTuple):
    """What of ``.metadata`` stays the same from save to save.

    Attributes:
        before: the pickle up to the places of the objects.
        objects: (index of the item, its ``MetadataIndex``) of each object.
        ids: the bytes before, between and after the checkpoint's path and the save's id.
    """

    before: bytes
    objects: list[tuple[int, bytes]]
    ids: tuple[bytes, bytes, bytes]


class _StemWriter:
    def __init__(self, layout: Layout, templates: Templates) -> None:
        self._layout = layout
        self._templates = templates
        self._start, first_string = templates["start"]
        self._strings = Strings(int.from_bytes(first_string, "little"))
        self._whole_indices: dict[int, tuple[bytes, bytes]] = {}  # by dimensions: the bytes around the name
        self._whole_tensors: dict[int, bytes] = {}  # by kind: most have one of a few
        self._items = layout.items

    @no_collection()
    def write(self) -> _Stem:
        # The order is that of Metadata's fields. A string is written in full where it comes first, so ``_strings`` must
        # be asked for each string in the order in which the pieces are joined.
        piece_of = self._strings.piece
        state, paths, storage, middle, between, after = self._templates["metadata"]
        names = names_of([path for path, _ in leaves(self._layout.structure)])
        found = leaves(self._layout.structure, text_keys=True)
        named = [  # recipes are stager's own: a stock reader would take one for an entry of its mapping
            (path, name, leaf) for (path, leaf), name in zip(found, names, strict=True) if not is_recipe(path)
        ]
        pieces = [self._start, state, DICT_START]
        for _, name, leaf in named:
            pieces += (piece_of(name), self._state(leaf))
        pieces += (DICT_END, paths, DICT_START)
        for path, name, _ in named:
            pieces += (piece_of(name), self._path(path))
        pieces += (DICT_END, storage, DICT_START)
        objects = []
        files = [plain_string(file.name) for file in self._layout.files]
        items = self._items
        before, after_file, after_offset, end = self._templates["storage info"]
        for _, name, leaf in named:
            for offsets, index in leaf.parts if isinstance(leaf, Chunks) else ((None, leaf),):
                key = self._index(name, items.kinds[items.kind[index]], offsets)
                if index >= self._layout.cache.num_fixed:
                    objects.append((index, key))
                else:
                    file, offset = files[items.file[index]], integer(items.offset[index])
                    pieces += (key, before, file, after_file, offset, after_offset, integer(items.nbytes[index]), end)
        return _Stem(b"".join(pieces), objects, (DICT_END + middle, between, after + END))

    def _state(self, leaf: int | Chunks) -> bytes:
        """Return the value of ``state_dict_metadata`` for a leaf."""
        kinds, codes = self._items.kinds, self._items.kind
        if isinstance(leaf, Chunks):
            chunks = [(offsets, kinds[codes[index]].shape) for offsets, index in leaf.parts]
            return self._tensor(kinds[codes[leaf.parts[0][1]]], leaf.shape, chunks)
        code = codes[leaf]
        if code not in self._whole_tensors:
            kind = kinds[code]
            self._whole_tensors[code] = (
                self._tensor(kind, kind.shape, [((0,) * len(kind.shape), kind.shape)])
                if kind.kind == "tensor"
                else self._templates["object"][0]
            )
        return self._whole_tensors[code]

    def _tensor(self, kind: ItemKind, shape: tuple[int, ...], chunks: Sequence[tuple[tuple[int, ...], ...]]) -> bytes:
        template = self._templates[f"chunk {len(shape)}"]
        filled = [fill(template, map(integer, (*offsets, *lengths))) for offsets, lengths in chunks]
        return fill(self._templates[tensor_name(kind)], [*map(integer, shape), list_of(filled)])

    def _path(self, path: Path) -> bytes:
        return tuple_of([self._strings.piece(key) if isinstance(key, str) else integer(int(key or 0)) for key in path])

    def _index(self, name: str, kind: ItemKind, offsets: tuple[int, ...] | None) -> bytes:
        """Return the ``MetadataIndex`` of an item of a kind; ``offsets`` is None if the item is not a chunk."""
        if kind.kind != "tensor":
            return fill(self._templates["index of an object"], [self._strings.piece(name)])
        dims = len(kind.shape)
        if offsets is not None:
            return fill(self._templates[f"index {dims}"], [self._strings.piece(name), *map(integer, offsets)])
        if dims not in self._whole_indices:
            before, *after = self._templates[f"index {dims}"]
            self._whole_indices[dims] = before, fill(after, [integer(0)] * dims)
        before, end = self._whole_indices[dims]
        return b"%b%b%b" % (before, self._strings.piece(name), end)
