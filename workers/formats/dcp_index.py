"""``.metadata``: the pickled ``Metadata`` that stock DCP starts from, written piece by piece (see ``pickle_template.py``).

It is equal to what pickling the dataclasses would give, which a test compares. All but the objects' places and the
checkpoint's identity is the same from save to save and is kept with the plan.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo

from workers.dtypes import dtype_of
from workers.formats.pickle_template import (
    DICT_END,
    DICT_START,
    PickleWriter,
    integer,
    mark,
    plain_string,
    tuple_of,
)
from workers.layout import Item, Layout
from workers.memo import no_collection
from workers.structure import Node, fqn

_DcpPath = tuple[str | int, ...]


def dcp_index(layout: Layout, save_id: str, directory: str) -> bytes:
    """
    Args:
        save_id: of the save.
        directory: that the checkpoint will have.
    """
    stem = layout.memo.of_plan("dcp index", lambda: _Stem.of(layout))
    pieces = [stem.before]
    for index, key in stem.rest:
        item = layout.items[index]
        pieces += (key, *stem.info.of(plain_string(layout.files[item.file].name), item))
    middle, between, after = stem.ids
    pieces += (middle, plain_string(directory), between, plain_string(save_id), after)
    return b"".join(pieces)


@dataclass(frozen=True, slots=True)
class _Info:
    """Template of a ``_StorageInfo``."""

    pieces: tuple[bytes, ...]

    @staticmethod
    def by(writer: PickleWriter) -> _Info:
        specimen = _StorageInfo(mark(0), mark(1), mark(2))  # type: ignore[arg-type]
        return _Info(writer.template(specimen, 3))

    def of(self, file: bytes, item: Item) -> tuple[bytes, ...]:
        before, after_file, after_offset, after = self.pieces
        return before, file, after_file, integer(item.offset), after_offset, integer(item.nbytes), after


@dataclass(frozen=True, slots=True)
class _Stem:
    """Attributes:
    before: the pickle up to the places of what is not fixed.
    rest: (item, its ``MetadataIndex``) of what is not.
    info: template of their places.
    ids: what comes before, between and after the checkpoint's path and the save's id.
    """

    before: bytes
    rest: tuple[tuple[int, bytes], ...]
    info: _Info
    ids: tuple[bytes, bytes, bytes]

    @staticmethod
    def of(layout: Layout) -> _Stem:
        with no_collection():
            return _StemWriter(layout).write()


class _StemWriter:
    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._properties = {
            dtype: dcp_metadata.TensorProperties(dtype=dtype_of(dtype))
            for dtype in {item.dtype for item in layout.items if item.kind == "tensor"}
        }
        specimens = [
            *map(self._tensor_metadata, ((dtype, (1,)) for dtype in self._properties)),
            dcp_metadata.BytesStorageMetadata(),
            dcp_metadata.MetadataIndex("", torch.Size((0,))),
            _StorageInfo("", 0, 0),
        ]
        self._writer = PickleWriter(specimens)
        self._states: dict[tuple[str, tuple[int, ...]], bytes] = {}
        self._indices: dict[int, tuple[bytes, ...]] = {}  # by number of dimensions; -1: of an object

    def write(self) -> _Stem:
        layout, writer = self._layout, self._writer
        storage_meta = dcp_metadata.StorageMeta(checkpoint_id=mark(3), save_id=mark(4))
        state, paths, storage, *ids = writer.template(
            dcp_metadata.Metadata(mark(0), mark(1), mark(2), storage_meta),  # type: ignore[arg-type]
            5,
        )
        info = _Info.by(writer)
        leaves = [(path, fqn(path), index) for path, index in _dcp_walk(layout.structure)]
        pieces = [writer.start, state, DICT_START]
        for _, name, index in leaves:
            pieces += (writer.string(name), self._state(layout.items[index]))
        pieces += (DICT_END, paths, DICT_START)
        for path, name, _ in leaves:
            pieces += (writer.string(name), self._path(path))
        pieces += (DICT_END, storage, DICT_START)
        rest = []
        names = [plain_string(file.name) for file in layout.files]
        for _, name, index in leaves:
            item, key = layout.items[index], self._index(name, layout.items[index])
            if index >= layout.memo.num_fixed:
                rest.append((index, key))
            else:
                pieces += (key, *info.of(names[item.file], item))
        middle, between, after = ids
        return _Stem(b"".join(pieces), tuple(rest), info, (DICT_END + middle, between, after + writer.end))

    def _tensor_metadata(self, kind: tuple[str, tuple[int, ...]]) -> dcp_metadata.TensorStorageMetadata:
        dtype, shape = kind
        chunk = dcp_metadata.ChunkStorageMetadata(torch.Size([0] * len(shape)), torch.Size(shape))
        return dcp_metadata.TensorStorageMetadata(self._properties[dtype], torch.Size(shape), [chunk])

    def _state(self, item: Item) -> bytes:
        kind = item.dtype, item.shape
        if kind not in self._states:
            is_tensor = item.kind == "tensor"
            value = self._tensor_metadata(kind) if is_tensor else dcp_metadata.BytesStorageMetadata()
            self._states[kind] = self._writer.constant(value)
        return self._states[kind]

    def _path(self, path: _DcpPath) -> bytes:
        return tuple_of([self._writer.string(key) if isinstance(key, str) else integer(key) for key in path])

    def _index(self, name: str, item: Item) -> bytes:
        dims = len(item.shape) if item.kind == "tensor" else -1
        if dims not in self._indices:
            offsets = torch.Size([0] * dims) if dims >= 0 else None
            self._indices[dims] = self._writer.template(dcp_metadata.MetadataIndex(mark(0), offsets), 1)
        before, after = self._indices[dims]
        return b"%b%b%b" % (before, self._writer.string(name), after)


def _dcp_walk(node: Node, path: _DcpPath = ()) -> Iterator[tuple[_DcpPath, int]]:
    """As ``structure.walk``, with the paths DCP uses: ``str`` for every mapping key, ``int`` for list positions."""
    if type(node) is int:
        yield path, node
    elif node[0] == "list":
        for position, child in enumerate(node[1]):
            yield from _dcp_walk(child, (*path, position))
    else:
        for key, child in zip(node[1], node[2], strict=True):
            yield from _dcp_walk(child, (*path, str(key)))
