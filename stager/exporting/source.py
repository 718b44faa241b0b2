"""The checkpoint that is exported: tensors, each once and whole, also where several ranks wrote it in chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import xxhash

from stager.exporting.part import Part
from stager.loading.chunks import with_wholes
from stager.workers.checkpoint.directory.manifest import Manifest
from stager.workers.checkpoint.layout.layout import num_segments
from stager.workers.checkpoint.layout.structure import Path, describe, walk
from stager.workers.checkpoint.read.blob_reader import BlobReader


class Source(BlobReader):
    """What is exported of a checkpoint, and its bytes: little memory however large an item is, each hash checked.

    Args:
        path, manifest: the checkpoint.
        part: what is exported of it.
        chunk_bytes: how much is in memory at a time.
        progress: called with the number of bytes just read.

    Attributes:
        items: those of the manifest, then the wholes of tensors that are stored in chunks.
        structure: that of the part; its leaves are indices into ``items``.
        paths: the key paths of each of its leaves.
        tensors, objects: its leaves, each once.
    """

    def __init__(
        self, path: str, manifest: Manifest, part: Part, chunk_bytes: int, progress: Callable[[int], None]
    ) -> None:
        wholes = with_wholes(manifest)
        self.items = wholes.manifest.layout.items
        self.structure = part.of(wholes.manifest.layout.structure, path)
        self.paths: dict[int, list[Path]] = {}
        for key_path, number in walk(self.structure):
            self.paths.setdefault(number, []).append(key_path)
        self.tensors = [number for number in self.paths if self.items[number].kind == "tensor"]
        self.objects = [number for number in self.paths if self.items[number].kind == "object"]
        self._chunks = wholes.chunks
        self._buffer = memoryview(bytearray(chunk_bytes))
        super().__init__(path, manifest, 1, progress)  # last: it opens files, which are closed only if all is well

    def name(self, number: int) -> str:
        """A leaf's first key path, as a user would write it."""
        return describe(self.paths[number][0])

    def parts(self, number: int) -> tuple[tuple[tuple[int, ...], int], ...]:
        """What a tensor consists of: (offsets in the tensor, stored item) of each part."""
        if number in self._chunks:
            return self._chunks[number].parts
        return (((0,) * len(self.items[number].shape), number),)

    def data(self, number: int) -> Iterator[memoryview]:
        """The raw bytes of a stored item, in order. What was yielded is valid until the next one is asked for.

        Raises:
            CorruptCheckpointError: a hash does not match, perhaps after the bytes it covers were yielded.
            StorageError: a read failed.
        """
        item, end, step = self.items[number], self._ends[number], self._manifest.layout.segment_bytes
        low, high = item.data_offset, item.data_offset + item.data_nbytes
        for segment in range(num_segments(end - item.offset, step)):
            start = item.offset + segment * step
            stop = min(start + step, end)
            hasher = xxhash.xxh3_128()
            for position in range(start, stop, len(self._buffer)):
                chunk = self._buffer[: stop - position]
                self._pread(item.file, chunk, position)
                hasher.update(chunk)
                yield chunk[max(low - position, 0) : max(high - position, 0)]  # without header, tail and padding
            self._check(number, segment, hasher.hexdigest())
            self._progress(stop - start)
