"""``StagerStorage``: torch_checkpointing's storage, whose checkpoints are stager's."""

from __future__ import annotations

import io
import multiprocessing
import os
import threading
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch_checkpointing.storage.base_storage import ReadArgs, StorageConfig
from torch_checkpointing.storage.filesystem import LocalFileSystemStorage, LocalFileSystemStorageConfig

from stager.integrations.torch_checkpointing_parts.commit import commit
from stager.integrations.torch_checkpointing_parts.leftovers import begin
from stager.integrations.torch_checkpointing_parts.read_stream import HashedFile, ReadStream, hashed_files
from stager.integrations.torch_checkpointing_parts.receipt import is_marker, is_receipt, is_unfinished, receipt_path
from stager.integrations.torch_checkpointing_parts.write_stream import WriteStream
from stager.workers.checkpoint.documents.manifest import MANIFEST_NAME
from stager.workers.checkpoint.storage.posix import files
from stager.workers.checkpoint.storage.posix.files import storage_errors
from stager.workers.errors import ArgumentError

_RUN_KEY = "stager/torch_checkpointing/run"
_WRITING_THREADS = "ckpt-write"  # how a CheckpointWriter calls the threads that it starts for each save


def _has_process_group() -> bool:
    return dist.is_available() and dist.is_initialized()


@cache
def _writer_of(pid: int) -> str:
    return uuid.uuid4().hex


@dataclass
class StagerStorageConfig(StorageConfig):
    """Writes checkpoints that are stager's, and reads them: ``CheckpointManager.Config(storage_config=...)``.

    Attributes:
        fsync: a checkpoint is durable before it has its name.
        verify: compare what is read with its hashes. A checkpoint that torch_checkpointing wrote without stager has none.
    """

    fsync: bool = True
    verify: bool = True
    _run: str | None = field(default=None, init=False, repr=False)
    _writer: str | None = field(default=None, init=False, repr=False)

    # NOTE [ Whose files ]
    # A training that is killed while it saves leaves files under torch_checkpointing's temporary name. The next one that
    # saves to that name, maybe with fewer ranks, finds them beside its own. So each file's receipt has the *run*: an id that
    # the ranks of one process group have in common. The subprocess of torch_checkpointing has no process group, and gets the
    # id with this configuration. Without a process group it is empty: then a file is known as another training's only
    # if that had one.
    #
    # A save that fails leaves files there, too, and the training may go on and save to that name again, without one of the
    # items. So each receipt also has the *writer*: an id of the process that trains, which its subprocess gets with this
    # configuration. When a save begins, each process removes what it has left itself (leftovers.py). The ranks need not
    # agree on anything for that: the commit comes behind a barrier, so behind the beginning of every rank's save.

    def create_storage(self) -> StagerStorage:
        """Make the storage of this process."""
        return StagerStorage(self)

    def run(self) -> str:
        """Return the id that the ranks of this training have in common; "" without a process group."""
        if self._run is not None or not _has_process_group():
            return self._run or ""
        store = dist.distributed_c10d._get_default_store()
        return bytes(store.compare_set(_RUN_KEY, "", uuid.uuid4().hex)).decode()  # that of whoever comes first

    def writer(self) -> str:
        """Return the id of the process that trains: this one, or the one whose subprocess this is.

        Ranks that got one configuration from their parent process have an id each, or one would remove another's files.
        """
        # torch_checkpointing's subprocess is a daemon, and has no process group.
        is_subprocess = multiprocessing.current_process().daemon and not _has_process_group()
        return self._writer if is_subprocess and self._writer is not None else _writer_of(os.getpid())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_run": self.run(), "_writer": self.writer()}


class StagerStorage(LocalFileSystemStorage):
    """A directory on a file system that all ranks see. To be made by ``StagerStorageConfig.create_storage()``.

    ``rename()`` of a directory is the commit (``commit.py``). What is in it by then belongs to the checkpoint.
    """

    def __init__(self, config: StagerStorageConfig) -> None:
        super().__init__(LocalFileSystemStorageConfig(use_direct_io=False))
        self._config = config
        self._read: tuple[str, tuple[int, ...], Mapping[str, HashedFile] | None] | None = None  # the last directory

    # -- writing ------------------------------------------------------------------------------------------------

    def mkdir(self, path: Path, recursive: bool = True) -> None:
        """Make a directory. If a save begins so, remove what this process has left in it with a save that failed."""
        super().mkdir(path, recursive)
        # Not if a callback calls it, which runs when the save has written its files: it has another thread.
        if threading.current_thread().name.startswith(_WRITING_THREADS):
            begin(os.fspath(path), self._config.writer())

    def stream_write(self, path: Path) -> WriteStream:
        """Return a stream to a file, which appears when the ``with`` block of the stream ends.

        Raises:
            ArgumentError: stager has a file of this name in each checkpoint.
        """
        if os.path.basename(path) == MANIFEST_NAME:
            raise ArgumentError(
                f"{path}: each checkpoint of stager has its {MANIFEST_NAME}; give the item another file_path"
            )
        return WriteStream(os.fspath(path), self._config.fsync, self._run, self._config.writer())

    @cached_property
    def _run(self) -> str:
        return self._config.run()

    def write(self, path: Path, data: Any) -> None:
        """Write a file."""
        with self.stream_write(path) as stream:
            stream.write(data)

    def rename(
        self, src_path: Path, dst_path: Path, is_directory: bool = False, background_cleanup: bool = False
    ) -> None:
        """Commit a directory as a checkpoint, or rename a file.

        Raises:
            OSError: something is at ``dst_path``, as the table of ``Storage.rename()`` says.
        """
        source, final = os.fspath(src_path), os.fspath(dst_path)
        if os.path.isdir(source):
            commit(source, final, self._run, self._config.fsync)
            return
        receipt = receipt_path(source)
        has_receipt = os.path.lexists(receipt)
        files.remove(receipt_path(final))
        super().rename(src_path, dst_path)
        if has_receipt:
            os.rename(receipt, receipt_path(final))

    def delete(self, path: Path) -> None:
        """Remove a file."""
        super().delete(path)
        files.remove(receipt_path(os.fspath(path)))

    def ls(self, path: Path) -> list[str]:
        """List a directory. What stager needs until the commit is not shown."""
        return [name for name in super().ls(path) if not (is_receipt(name) or is_marker(name) or is_unfinished(name))]

    # -- reading ------------------------------------------------------------------------------------------------

    def stream_read(self, path: Path, read_args: ReadArgs | None = None) -> Any:
        """Return a stream over a file.

        Raises:
            CorruptCheckpointError: the manifest, or with ``pre_read_full_file`` the file, is damaged; otherwise the stream
                raises it.
        """
        expected = self._expected(os.fspath(path)) if self._config.verify else None
        if expected is None:
            return super().stream_read(path, read_args)
        stream = ReadStream(os.fspath(path), expected)
        if read_args is not None and not read_args.pre_read_full_file:
            return stream
        with stream:
            return io.BytesIO(stream.read())

    def getsize(self, path: Path) -> int:
        """Return the size of a file in bytes.

        Raises:
            CorruptCheckpointError: the manifest names another one.
        """
        nbytes: int = super().getsize(path)
        expected = self._expected(os.fspath(path)) if self._config.verify else None
        if expected is not None:
            expected.check_size(os.fspath(path), nbytes)
        return nbytes

    def _expected(self, path: str) -> HashedFile | None:
        """Return what the manifest says of a file; None if there is no manifest, or it does not name the file."""
        directory, name = os.path.split(os.path.abspath(path))
        known = self._read  # several threads read
        identity = _identity(os.path.join(directory, MANIFEST_NAME))
        if known is None or known[:2] != (directory, identity):
            known = directory, identity, hashed_files(directory) if identity else None
            self._read = known
        return None if known[2] is None else known[2].get(name)


def _identity(path: str) -> tuple[int, ...]:
    with storage_errors("look at", path):
        try:
            stat = os.stat(path)
        except FileNotFoundError:
            return ()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns
