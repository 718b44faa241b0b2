"""The checkpoint that is exported: tensors, each once and whole, also where several ranks wrote it in chunks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import xxhash

from stager.exporting.part import Part
from stager.loading.chunks import with_wholes
from stager.loading.foreign_path import not_ours
from stager.workers.checkpoint.directory.choice import choose_checkpoint
from stager.workers.checkpoint.directory.manifest_file import read_header
from stager.workers.checkpoint.directory.run_directory import committed_steps, is_checkpoint_directory
from stager.workers.checkpoint.documents.manifest import Manifest
from stager.workers.checkpoint.layout.layout import num_segments
from stager.workers.checkpoint.layout.structure import RECIPE, Path, describe, walk
from stager.workers.checkpoint.read.blob_reader import BlobReader
from stager.workers.checkpoint.storage.places import storage_of
from stager.workers.errors import CheckpointNotFoundError, CorruptCheckpointError, StorageError


def chosen_checkpoint(path: str, step: int | None) -> str:
    """Return the checkpoint of stager that ``path`` is or has.

    Args:
        path: absolute; of a checkpoint or a run.
        step: which checkpoint of the run; None: the newest.

    Raises:
        CheckpointNotFoundError: there is none; says what there is.
        UsageError: ``step`` is given, and ``path`` is no run.
    """
    is_run = storage_of(path).has_directory(path) and not is_checkpoint_directory(path) and bool(committed_steps(path))
    if not is_run and (problem := not_ours(path)) is not None:
        raise CheckpointNotFoundError(None, problem, path)
    return choose_checkpoint(path, step)


@contextmanager
def opening(path: str, manifest: Manifest) -> Iterator[None]:
    """Open the files of a checkpoint in the block: all of them are those of the manifest.

    A later save may replace the checkpoint at any time. From then on its path leads to the files of another one, which have
    the same names; the files that are open stay the first one's.

    Args:
        path, manifest: the checkpoint, as it was before the block.

    Raises:
        CheckpointNotFoundError: it was replaced or removed before the block ended, so a file may be another checkpoint's.
    """
    try:
        yield
    except (CorruptCheckpointError, StorageError) as error:
        _check_is_still(path, manifest, error)
        raise
    _check_is_still(path, manifest)


def _check_is_still(path: str, manifest: Manifest, cause: Exception | None = None) -> None:
    try:
        is_still = read_header(path).save_id == manifest.header.save_id
    except CheckpointNotFoundError:
        is_still = False
    if not is_still:
        what = "was replaced or removed when its export began, so nothing was exported; export what is there now"
        raise CheckpointNotFoundError(None, what, path) from cause


class _Buffer(threading.local):
    """Memory for a chunk, for each thread that reads."""

    def __init__(self, nbytes: int) -> None:
        self.memory = memoryview(bytearray(nbytes))


class Source(BlobReader):
    """What is exported of a checkpoint, and its bytes: little memory however large an item is, each hash checked.

    Several threads may read at a time.

    Args:
        path, manifest: the checkpoint.
        part: what is exported of it.
        chunk_bytes: how much each thread has in memory at a time.
        progress: called with the number of bytes just read, from the thread that read them.

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
        self._buffer = _Buffer(chunk_bytes)
        super().__init__(path, manifest, 1, progress)  # last: it opens files, which are closed only if all is well

    def name(self, number: int) -> str:
        """A leaf's first key path, as a user would write it."""
        return describe(self.paths[number][0])

    def names_of_objects(self) -> tuple[str, ...]:
        """The objects as a user would write them. A recipe is named for its container, whose class it is."""
        paths = (path[:-1] if path[-1:] == (RECIPE,) else path for path in (self.paths[n][0] for n in self.objects))
        return tuple(dict.fromkeys(map(describe, paths)))

    def parts(self, number: int) -> tuple[tuple[tuple[int, ...], int], ...]:
        """What a tensor consists of: (offsets in the tensor, stored item) of each part."""
        if number in self._chunks:
            return self._chunks[number].parts
        return (((0,) * len(self.items[number].shape), number),)

    def data(self, number: int) -> Iterator[memoryview]:
        """The raw bytes of a stored item, in order. What was yielded is valid until this thread asks for the next.

        Raises:
            CorruptCheckpointError: a hash does not match, perhaps after the bytes it covers were yielded.
            StorageError: a read failed.
        """
        buffer = self._buffer.memory
        item, end, step = self.items[number], self._ends[number], self._manifest.layout.segment_bytes
        low, high = item.data_offset, item.data_offset + item.data_nbytes
        for segment in range(num_segments(end - item.offset, step)):
            start = item.offset + segment * step
            stop = min(start + step, end)
            hasher = xxhash.xxh3_128()
            for position in range(start, stop, len(buffer)):
                chunk = buffer[: stop - position]
                self._pread(item.file, chunk, position)
                hasher.update(chunk)
                yield chunk[max(low - position, 0) : max(high - position, 0)]  # without header, tail and padding
            self._check(number, segment, hasher.hexdigest())
            self._progress(stop - start)
