"""The files that were saved with a checkpoint (``save(files=...)``), read when somebody asks for one."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping

from stager.workers.checkpoint.documents.manifest import Manifest
from stager.workers.checkpoint.read.verify import read_index_file
from stager.workers.checkpoint.storage.places import storage_of
from stager.workers.errors import CorruptCheckpointError, StorageError


class CheckpointFiles(Mapping[str, bytes]):
    """The files of one checkpoint: names to bytes, each checked against its hash when it is read.

    Raises:
        CorruptCheckpointError: the file is damaged.
        StorageError: it cannot be read: the checkpoint was removed or replaced after it was loaded, for example.
    """

    def __init__(self, path: str, manifest: Manifest) -> None:
        self._path = path
        self._manifest = manifest
        names = set(manifest.header.sidecars)
        self._files = {file.name: file for file in manifest.index_files if file.name in names}

    def __getitem__(self, name: str) -> bytes:
        file = self._files[name]
        try:
            return read_index_file(self._path, self._manifest, file)
        except (CorruptCheckpointError, StorageError) as error:
            head = storage_of(self._path).head(self._path)
            if head is None or head.save_id == self._manifest.header.save_id:
                raise
            problem = "another save has replaced this checkpoint since it was loaded; load it again"
            raise StorageError(errno.ESTALE, problem, self._path) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __repr__(self) -> str:
        return f"<files {', '.join(self._files)} of {self._path}>"
