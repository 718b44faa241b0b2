"""``.metadata``: the pickled ``Metadata`` that stock DCP starts from, filled in from templates (``dcp_templates.py``).

Unpickled, it equals the dataclasses that DCP itself would have pickled; a test compares them. From save to save only the
places of the objects and the identity of the checkpoint change. The rest is made once per plan (:class:`_Stem`).
"""

from __future__ import annotations

from dataclasses import dataclass

from stager.workers.checkpoint.formats.pickle_template import (
    DICT_END,
    DICT_START,
    END,
    Strings,
    fill,
    integer,
    list_of,
    plain_string,
    tuple_of,
)
from stager.workers.checkpoint.layout.layout import Item, Layout
from stager.workers.checkpoint.layout.plan_cache import Templates
from stager.workers.checkpoint.layout.structure import Chunks, Path, leaves, names_of
from stager.workers.gc_pause import no_collection


def tensor_name(item: Item) -> str:
    """Name the template of a tensor's ``TensorStorageMetadata``. To fill in: its lengths, its list of chunks."""
    return f"tensor {item.dtype} {len(item.shape)}"


def chunk_name(dims: int) -> str:
    """Name the template of a ``ChunkStorageMetadata``. To fill in: offsets, lengths."""
    return f"chunk {dims}"


def index_name(dims: int | None) -> str:
    """Name the template of the ``MetadataIndex`` of a tensor of ``dims`` dimensions, or of an object (None).

    To fill in: the name, the offsets.
    """
    return "index of an object" if dims is None else f"index {dims}"


def dcp_index(layout: Layout, templates: Templates, save_id: str, directory: str) -> bytes:
    """Make ``.metadata``.

    Args:
        templates: from ``dcp_templates.index_templates``.
        save_id: of the save.
        directory: the final path of the checkpoint.
    """
    stem = layout.cache.once_per_plan("dcp index", lambda: _Stem.of(layout, templates))
    pieces = [stem.before]
    for index, key in stem.rest:
        item = layout.items[index]
        pieces += (key, *stem.info.of(plain_string(layout.files[item.file].name), item))
    middle, between, after = stem.ids
    pieces += (middle, plain_string(directory), between, plain_string(save_id), after)
    return b"".join(pieces)


@dataclass(frozen=True, slots=True)
class _Info:
    """Template of a ``_StorageInfo``: where an item is."""

    pieces: tuple[bytes, ...]

    def of(self, file: bytes, item: Item) -> tuple[bytes, ...]:
        before, after_file, after_offset, after = self.pieces
        return before, file, after_file, integer(item.offset), after_offset, integer(item.nbytes), after


@dataclass(frozen=True, slots=True)
class _Stem:
    """What of ``.metadata`` stays the same from save to save.

    Attributes:
        before: the pickle up to the places of the objects.
        rest: (index of the item, its ``MetadataIndex``) of each object.
        info: template of their places.
        ids: the bytes before, between and after the checkpoint's path and the save's id.
    """

    before: bytes
    rest: tuple[tuple[int, bytes], ...]
    info: _Info
    ids: tuple[bytes, bytes, bytes]

    @staticmethod
    def of(layout: Layout, templates: Templates) -> _Stem:
        with no_collection():
            return _StemWriter(layout, templates).write()


class _StemWriter:
    def __init__(self, layout: Layout, templates: Templates) -> None:
        self._layout = layout
        self._templates = templates
        self._start, first_string = templates["start"]
        self._strings = Strings(int.from_bytes(first_string, "little"))
        self._states: dict[tuple[str, tuple[int, ...]], bytes] = {}
        self._in_one: dict[
            int, tuple[bytes, bytes]
        ] = {}  # by dimensions: the bytes around the name of an item that is not in chunks

    def write(self) -> _Stem:
        layout, strings = self._layout, self._strings
        state, paths, storage, *ids = self._templates["metadata"]
        info = _Info(self._templates["storage info"])
        found = list(leaves(layout.structure, text_keys=True))
        named = [(path, name, leaf) for (path, leaf), name in zip(found, self._names(), strict=True)]
        pieces = [self._start, state, DICT_START]
        for _, name, leaf in named:
            pieces += (strings.piece(name), self._state(leaf))
        pieces += (DICT_END, paths, DICT_START)
        for path, name, _ in named:
            pieces += (strings.piece(name), self._path(path))
        pieces += (DICT_END, storage, DICT_START)
        rest = []
        names = [plain_string(file.name) for file in layout.files]
        for _, name, leaf in named:
            parts = leaf.parts if isinstance(leaf, Chunks) else ((None, leaf),)
            for offsets, index in parts:
                item, key = layout.items[index], self._index(name, layout.items[index], offsets)
                if index >= layout.cache.num_fixed:
                    rest.append((index, key))
                else:
                    pieces += (key, *info.of(names[item.file], item))
        middle, between, after = ids
        return _Stem(b"".join(pieces), tuple(rest), info, (DICT_END + middle, between, after + END))

    def _names(self) -> list[str]:
        return names_of([path for path, _ in leaves(self._layout.structure)])

    def _state(self, leaf: int | Chunks) -> bytes:
        items = self._layout.items
        if isinstance(leaf, Chunks):
            chunks = [self._chunk(offsets, items[index].shape) for offsets, index in leaf.parts]
            return self._tensor(items[leaf.parts[0][1]], leaf.shape, chunks)
        item = items[leaf]
        if item.kind != "tensor":
            return self._templates["object"][0]
        kind = item.dtype, item.shape
        if kind not in self._states:
            chunk = self._chunk((0,) * len(item.shape), item.shape)
            self._states[kind] = self._tensor(item, item.shape, [chunk])
        return self._states[kind]

    def _tensor(self, item: Item, shape: tuple[int, ...], chunks: list[bytes]) -> bytes:
        return fill(self._templates[tensor_name(item)], [*map(integer, shape), list_of(chunks)])

    def _chunk(self, offsets: tuple[int, ...], lengths: tuple[int, ...]) -> bytes:
        return fill(self._templates[chunk_name(len(lengths))], map(integer, (*offsets, *lengths)))

    def _path(self, path: Path) -> bytes:
        return tuple_of([self._strings.piece(key) if isinstance(key, str) else integer(int(key or 0)) for key in path])

    def _index(self, name: str, item: Item, offsets: tuple[int, ...] | None) -> bytes:
        if offsets is not None:
            pieces = self._templates[index_name(len(offsets))]
            return fill(pieces, [self._strings.piece(name), *map(integer, offsets)])
        dims = len(item.shape) if item.kind == "tensor" else -1
        if dims not in self._in_one:
            before, *after = self._templates[index_name(None if dims < 0 else dims)]
            self._in_one[dims] = before, fill(after, [integer(0)] * dims)
        before, end = self._in_one[dims]
        return b"%b%b%b" % (before, self._strings.piece(name), end)
