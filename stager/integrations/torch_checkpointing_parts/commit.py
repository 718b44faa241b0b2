"""From a directory of files with receipts to a checkpoint: ``Storage.rename()`` of torch_checkpointing, which commits.

    every rank   begin()        what a failed save of this process has left is removed (``leftovers.py``)
    every rank   WriteStream    each file synced, a receipt beside it, and renamed to its name
    every rank                  torch_checkpointing's barrier: all files are there
    rank 0       commit()       1. files of another training, which was killed while it saved to this name, are removed
                                2. receipts become a layout; a file without one is read and hashed
                                3. the manifest is written and synced
                                4. receipts and markers are removed, and the directory is synced
                                5. the directory gets its final name, and the parent is synced. Now there is a checkpoint

The files keep the names and bytes that torch_checkpointing gives them, so it reads them, with or without stager. An archive
of ``torch.save`` is an object of the checkpoint, named as its file without ``.pt``. Any other file is a sidecar if it is
small, and else bytes that are hashed and no value (the kind of item that ``layout.py`` calls a trailer).
"""

from __future__ import annotations

import errno
import os
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from stager.integrations.torch_checkpointing_parts.receipt import (
    SEGMENT_BYTES,
    FileReceipt,
    is_marker,
    is_receipt,
    is_unfinished,
    read_file_receipt,
    receipt_path,
)
from stager.integrations.torch_checkpointing_parts.write_stream import hash_file
from stager.workers._version import __version__
from stager.workers.checkpoint.documents.manifest import MANIFEST_NAME, IndexFile, Manifest, ManifestHeader
from stager.workers.checkpoint.documents.names import check_name, checkpoint_name, number_in
from stager.workers.checkpoint.layout.items import Item, Items
from stager.workers.checkpoint.layout.layout import FileSpec, Layout
from stager.workers.checkpoint.layout.layout_check import check_layout
from stager.workers.checkpoint.storage.posix import files
from stager.workers.checkpoint.storage.posix.files import storage_errors
from stager.workers.errors import StorageError
from stager.workers.faults import point

KIND = "torch_checkpointing"
"""The format of such a checkpoint, as ``stager ls`` shows it."""

_SIDECAR_BYTES = SEGMENT_BYTES  # up to so many, Loaded.files has the file
_HEAD_BYTES = 256


@dataclass(frozen=True, slots=True)
class _File:
    name: str
    receipt: FileReceipt
    is_archive: bool

    @property
    def is_small(self) -> bool:
        return not self.is_archive and self.receipt.nbytes <= _SIDECAR_BYTES


def commit(source: str, final: str, run: str, fsync: bool) -> None:
    """Make a checkpoint of the directory ``source``, and give it its final path, at which there is nothing yet.

    Args:
        run: of this training; "" if it has no process group.

    Raises:
        StorageError: there is something at ``final``, or it cannot be the path of a checkpoint; or the file system failed.
    """
    directory, name = os.path.split(os.path.realpath(final))
    try:
        check_name(name)
    except ValueError as error:
        raise StorageError(errno.EINVAL, f"no checkpoint can have the name {name!r}: {error}", final) from error
    with storage_errors("commit", source):
        _refuse_occupied(final)  # before the work; the rename says so again
        point("commit.begin")
        found = sorted(_files(source, run), key=lambda one: one.name)
        manifest = _manifest(found, name)
        point("commit.indexed")
        directory_fd = files.open_directory(source)
        try:
            # Before the receipts go: what a killed commit leaves without receipts is known by its manifest.
            files.write_atomically(directory_fd, source, MANIFEST_NAME, manifest.to_bytes(), fsync)
            point("commit.manifest")
            # Markers last: as long as there are receipts, the next save of their writer has to look at them.
            for left in sorted(filter(_is_for_the_commit, os.listdir(source)), key=is_marker):
                files.remove(os.path.join(source, left))
            if fsync:
                os.fsync(directory_fd)
        finally:
            os.close(directory_fd)
        _rename(source, final)
        if fsync:
            files.sync_directory(directory)
        point("commit.published")


def _is_for_the_commit(name: str) -> bool:
    return is_receipt(name) or is_marker(name)


def _refuse_occupied(final: str) -> None:
    is_free = not os.path.lexists(final) or (os.path.isdir(final) and not os.listdir(final))
    if not is_free:
        raise StorageError(
            errno.EEXIST, "something is there, and a commit replaces nothing; remove it, or save to another path", final
        )


def _rename(source: str, final: str) -> None:
    try:
        os.rename(source, final)  # replaces an empty directory, and nothing else
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            _refuse_occupied(final)
        if error.errno == errno.EXDEV:
            message = (
                f"{source} is on another file system, from which a checkpoint cannot appear at once; save beside it"
            )
            raise StorageError(error.errno, message, final) from error
        raise


def _files(source: str, run: str) -> Iterable[_File]:
    """Return what belongs to the checkpoint, and remove what a killed training has left in the same directory.

    Nothing is removed from a directory of which this training has written no file.
    """
    names = [name for name in os.listdir(source) if not (_is_for_the_commit(name) or name == MANIFEST_NAME)]
    receipts = {name: read_file_receipt(receipt_path(os.path.join(source, name))) for name in names}
    is_ours = any(receipt is not None and receipt.run == run for receipt in receipts.values())
    left = _mtime_ns(os.path.join(source, MANIFEST_NAME))
    for name in names:
        path, receipt = os.path.join(source, name), receipts[name]
        if is_unfinished(name):
            files.remove(path)
            continue
        if os.path.isdir(path):
            raise StorageError(
                errno.EISDIR,
                "a checkpoint of stager has no directories in it; take / out of LayoutInfo.file_path",
                path,
            )
        stat = os.stat(path)
        is_left = stat.st_mtime_ns <= left if receipt is None else receipt.run != run
        if is_ours and is_left:
            files.remove(path)
            continue
        if receipt is None or not receipt.is_of(stat):
            receipt = hash_file(path, run)
        yield _File(name, receipt, _is_archive(path))


def _mtime_ns(path: str) -> int:
    """Return when a commit wrote the manifest before it was killed; -1 if there is none."""
    try:
        return os.stat(path).st_mtime_ns
    except FileNotFoundError:
        return -1


def _is_archive(path: str) -> bool:
    """Whether a file is an archive of ``torch.save``, by its first record."""
    with open(path, "rb") as file:
        head = file.read(_HEAD_BYTES)
    return head.startswith(b"PK\x03\x04") and b"/data.pkl" in head


def _manifest(found: list[_File], name: str) -> Manifest:
    small = [one for one in found if one.is_small]
    data = [one for one in found if not one.is_small]
    items, names = [], []
    for number, one in enumerate(data):
        nbytes = one.receipt.nbytes
        items.append(Item("object" if one.is_archive else "frame", number, 0, nbytes, 0, nbytes, "", (), ()))
        names.append(one.name.removesuffix(".pt"))
    values = [number for number, one in enumerate(data) if one.is_archive]
    layout = Layout(
        files=tuple(FileSpec(one.name, one.receipt.nbytes) for one in data),
        items=Items.of(tuple(items)),
        structure=["dict", [names[number] for number in values], values],
        segment_bytes=SEGMENT_BYTES,
    )
    try:
        check_layout(layout)
    except (ValueError, TypeError, IndexError) as error:
        raise StorageError(
            errno.EINVAL, f"cannot be a checkpoint: {error}; see LayoutInfo.file_path of the items", name
        ) from error
    step = number_in(name) or 0
    header = ManifestHeader(
        kind=KIND,
        step=step,
        save_id=uuid.uuid4().hex,
        created=time.time(),
        torch=str(torch.__version__),
        stager=__version__,
        name="" if name == checkpoint_name(step) else name,
        sidecars=tuple(one.name for one in found),  # none of these names is stager's own
    )
    index_files = tuple(IndexFile(one.name, one.receipt.nbytes, one.receipt.whole) for one in small)
    return Manifest(header, layout, tuple(one.receipt.hashes for one in data), index_files)
