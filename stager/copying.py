"""Copying checkpoints from one place to another: file systems and object stores, in any direction, checked on the way."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import NamedTuple

import xxhash

from stager.config.calls import explained
from stager.saving.open_here import take_over
from stager.workers.checkpoint.commit.commit import put_in_place
from stager.workers.checkpoint.directory.choice import choose_checkpoint
from stager.workers.checkpoint.directory.manifest_file import has_own_manifest, read_header, read_manifest
from stager.workers.checkpoint.directory.reading import reading
from stager.workers.checkpoint.directory.run_directory import CheckpointInfo, checkpoint_names
from stager.workers.checkpoint.documents.manifest import MANIFEST_NAME, Manifest
from stager.workers.checkpoint.documents.names import partial_name
from stager.workers.checkpoint.layout.layout import Layout
from stager.workers.checkpoint.layout.structure import describe
from stager.workers.checkpoint.maintenance.recover import recover
from stager.workers.checkpoint.read.verify import read_index_file
from stager.workers.checkpoint.storage.data_file import DataFile
from stager.workers.checkpoint.storage.entry import Entry
from stager.workers.checkpoint.storage.paths import place_path
from stager.workers.checkpoint.storage.places import storage_of
from stager.workers.checkpoint.storage.posix.files import storage_errors
from stager.workers.checkpoint.storage.sink import SinkOptions
from stager.workers.checkpoint.storage.writing import PLAIN
from stager.workers.errors import CheckpointNotFoundError, CorruptCheckpointError, StorageError, UsageError

logger = logging.getLogger("stager")

_FILES_AT_ONCE = 4
_BLOCK_BYTES = 8 << 20  # a request takes tens of milliseconds, whatever it asks for


@dataclass(frozen=True, slots=True)
class CopyReport:
    """What :func:`copy_checkpoints` did.

    Attributes:
        destination: the run's directory, or its URL.
        copied: the checkpoints that were copied, as they are there now, oldest first.
        there: names of those that were there already.
    """

    destination: str
    copied: tuple[CheckpointInfo, ...]
    there: tuple[str, ...]


@explained('copy_checkpoints("runs/gpt", "s3://bucket/gpt")')
def copy_checkpoints(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    step: int | None = None,
    every: bool = False,
    replace: bool = False,
    progress: Callable[[int], None] | None = None,
) -> CopyReport:
    """Copy checkpoints into another run's directory. Each byte is compared with its hash before the copy is committed.

    A checkpoint that is there already, from the same save, is not copied again, so a copy that was interrupted goes on with
    the next one. Nobody else may write to the destination meanwhile: its lock is taken.

    Args:
        source: a checkpoint, or the directory of a run: its newest checkpoint.
        destination: the directory of a run, or its URL in an object store. It is made if it does not exist.
        step: which checkpoint of the run.
        every: all checkpoints of the run.
        replace: a checkpoint of the same name that is there from another save is replaced.
        progress: called with the number of bytes just copied, from several threads.

    Raises:
        CheckpointNotFoundError: the source has no such checkpoint.
        CorruptCheckpointError: a checkpoint is damaged. It is not copied; those before it are.
        UsageError: the arguments contradict each other, ``destination`` is a checkpoint, or it has a checkpoint of the same
            name from another save. Nothing was copied then.
        DirectoryInUseError: a run writes to the destination.
        StorageError
    """
    directory = place_path(destination, "destination")
    paths = _chosen(place_path(source, "source"), step, every)
    if has_own_manifest(directory):
        raise UsageError(f"{directory} is one checkpoint; name the directory of the run that is to have the copy")
    take_over(directory, "close that one first, with its close()")
    storage = storage_of(directory)
    storage.prepare(directory)
    copied: list[CheckpointInfo] = []
    there: list[str] = []
    with closing(storage.lock(directory, 0)):
        for found in recover(directory):
            logger.warning("%s", found)
        if not replace:
            _refuse_others(directory, paths)
        for path in paths:
            try:
                with reading(path):
                    manifest = read_manifest(path)
                    if _save_there(directory, manifest.header.final_name) == manifest.header.save_id:
                        there.append(manifest.header.final_name)
                    else:
                        copied.append(_copy(path, manifest, directory, progress or (lambda nbytes: None)))
            except (StorageError, CorruptCheckpointError):
                if not every or storage_of(path).has_manifest(path):
                    raise
                logger.warning("%s was removed while it was copied, and is left out", path)
                recover(directory)  # what was copied of it
    return CopyReport(directory, tuple(copied), tuple(there))


def _chosen(path: str, step: int | None, every: bool) -> list[str]:
    """Return the paths of the checkpoints, oldest first."""
    if not every:
        return [choose_checkpoint(path, step)]
    if step is not None:
        raise UsageError("step and every were both given; give one of them")
    if has_own_manifest(path):
        raise UsageError(f"{path} is one checkpoint; leave every (--all) out, or name its run")
    choose_checkpoint(path, None)  # raises if there is none
    return [os.path.join(path, name) for name in checkpoint_names(path).values()][::-1]


def _refuse_others(directory: str, paths: list[str]) -> None:
    """Raise UsageError if the destination has a checkpoint of the same name from another save."""
    for path in paths:
        with suppress(CheckpointNotFoundError, CorruptCheckpointError):  # said when it is copied
            header = read_header(path)
            there = _save_there(directory, header.final_name)
            if there not in ("", header.save_id):
                raise UsageError(
                    f"{os.path.join(directory, header.final_name)} is another checkpoint (save {there}) than {path} (save "
                    f"{header.save_id}), and nothing was copied; copy into another directory, or replace it: --replace, or "
                    "replace=True"
                )


def _save_there(directory: str, name: str) -> str:
    """Return the ID of the save whose checkpoint has a name in the destination; "": none that can be read."""
    with suppress(CheckpointNotFoundError, CorruptCheckpointError):
        return read_header(os.path.join(directory, name)).save_id
    return ""


def _copy(path: str, manifest: Manifest, directory: str, progress: Callable[[int], None]) -> CheckpointInfo:
    """Copy one checkpoint as a save is written: the data, then the small files, then the manifest, then its name."""
    header, layout = manifest.header, manifest.layout
    storage = storage_of(directory)
    final = os.path.join(directory, header.final_name)
    with storage.create(os.path.join(directory, partial_name(header.final_name, header.save_id))) as entry:
        with ThreadPoolExecutor(_FILES_AT_ONCE, thread_name_prefix="stager-copy") as executor:
            files = [
                executor.submit(_copy_file, path, manifest, file, entry, progress) for file in range(len(layout.files))
            ]
            for file in files:
                file.result()
        for index_file in manifest.index_files:
            entry.put(index_file.name, read_index_file(path, manifest, index_file), sync=True)
            progress(index_file.nbytes)
        # Links and the order among the saves of a trainer are those of the place that it comes from.
        header = dataclasses.replace(header, linked_bytes=0, generation=0, run="", number=0)
        copy = Manifest(header, layout, manifest.hashes, manifest.index_files, entry.stripes(layout))
        entry.put(MANIFEST_NAME, copy.to_bytes(), sync=True)
        put_in_place(entry, final, copy, fsync=True)
    return CheckpointInfo.of(final, copy)


def _copy_file(path: str, manifest: Manifest, file: int, entry: Entry, progress: Callable[[int], None]) -> None:
    layout = manifest.layout
    options = SinkOptions(layout.files[file].nbytes, {file}, PLAIN, early=True, before_write=lambda nbytes: None)
    name = os.path.join(path, layout.files[file].name)
    with storage_errors("copy", name):
        try:
            source = storage_of(path).open_data(path, manifest, file)
        except FileNotFoundError as error:
            raise CorruptCheckpointError(name, "is missing") from error
        with closing(source), closing(entry.sink(layout, options)) as sink:
            check = _Check(manifest, file, name)
            for at in range(0, source.nbytes, _BLOCK_BYTES):
                block = _read(source, at, min(_BLOCK_BYTES, source.nbytes - at), name)
                check.take(block)
                sink.put(file, at, block)
                progress(len(block))
            check.end(source.nbytes)
            sink.flush()
            sink.sync()


def _read(source: DataFile, offset: int, nbytes: int, name: str) -> memoryview:
    """Read a block. In new memory each time: the sink keeps it until it is written."""
    block, at = memoryview(bytearray(nbytes)), 0
    while at < nbytes:
        count = source.read_into(block[at:], offset + at)
        if count == 0:
            raise CorruptCheckpointError(name, f"is cut short: it ends at byte {offset + at}")
        at += count
    return block


class _Segment(NamedTuple):
    """A hashed range of a data file. ``item``: the one that it belongs to."""

    item: int
    start: int
    end: int
    digest: str


class _Check:
    """Compares the bytes of a data file, which come in order, with the hashes of its segments.

    Args:
        name: of the file, for messages.
    """

    def __init__(self, manifest: Manifest, file: int, name: str) -> None:
        self._manifest = manifest
        self._name = name
        self._segments = _segments(manifest.layout, manifest, file)
        self._at = 0
        self._hasher = xxhash.xxh3_128()
        self._now = next(self._segments, None)

    def take(self, block: memoryview) -> None:
        """Take the next bytes. Raises CorruptCheckpointError if a segment that ends in them is damaged."""
        while self._now is not None and len(block) >= self._now.end - self._at:
            nbytes = self._now.end - self._at
            self._hasher.update(block[:nbytes])
            block, self._at = block[nbytes:], self._now.end
            self._compare(self._now)
            self._hasher, self._now = xxhash.xxh3_128(), next(self._segments, None)
        self._hasher.update(block)
        self._at += len(block)

    def end(self, nbytes: int) -> None:
        """Raise CorruptCheckpointError unless the segments make up a file of so many bytes."""
        self.take(memoryview(b""))  # empty items at the end
        if self._now is not None or self._at != nbytes:
            raise CorruptCheckpointError(self._name, f"is {nbytes} bytes long, which is not what its manifest says")

    def _compare(self, segment: _Segment) -> None:
        if self._hasher.hexdigest() == segment.digest:
            return
        paths = [describe(leaf) for leaf, item in self._manifest.paths() if item == segment.item]
        what = ", ".join(paths[:3]) or "what stands around the values"
        raise CorruptCheckpointError(
            self._name, f"the bytes from {segment.start} on are damaged ({what}): their xxh3 hash does not match"
        )


def _segments(layout: Layout, manifest: Manifest, file: int) -> Iterator[_Segment]:
    """Iterate over the segments of a data file, in order."""
    files, starts, ends = layout.files_of_items(), layout.starts(), layout.ends()
    of_file = sorted((index for index in range(len(layout.items)) if files[index] == file), key=starts.__getitem__)
    for index in of_file:
        for number, digest in enumerate(manifest.hashes[index]):
            start = starts[index] + number * layout.segment_bytes
            yield _Segment(index, start, min(start + layout.segment_bytes, ends[index]), digest)
