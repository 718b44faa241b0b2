"""Files that lie beside exported weights: the configuration of the model, those of its tokenizer.

A checkpoint has some of its own, those that were given to ``save(files=...)``. The caller of the export names others.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass

from stager.workers.checkpoint.documents.manifest import Manifest
from stager.workers.checkpoint.read.verify import read_index_file
from stager.workers.checkpoint.storage.paths import local_path
from stager.workers.checkpoint.storage.posix.files import open_regular, storage_errors
from stager.workers.errors import UsageError

_OF_WEIGHTS = (".safetensors", ".safetensors.index.json")


@dataclass(frozen=True, slots=True)
class Sidecar:
    """A file that is copied beside the weights, under the name that it has.

    Attributes:
        path: where it is, absolute.
    """

    path: str

    @property
    def name(self) -> str:
        """Its name in the export."""
        return os.path.basename(self.path)

    def copy_to(self, directory: str) -> None:
        """Copy the file, and sync the copy.

        Raises:
            StorageError
        """
        # The cache of the Hugging Face hub has links in the place of files.
        with storage_errors("read", self.path), open(open_regular(os.path.realpath(self.path)), "rb") as source:
            target = os.path.join(directory, self.name)
            with storage_errors("write", target), open(target, "xb") as copy:
                shutil.copyfileobj(source, copy)
                copy.flush()
                os.fsync(copy.fileno())


@dataclass(frozen=True, slots=True)
class OwnSidecar(Sidecar):
    """A file of the checkpoint itself, which was saved with it.

    Attributes:
        data: its bytes, which fit the hash in the manifest.
    """

    data: bytes

    def copy_to(self, directory: str) -> None:
        """Write the file, and sync it.

        Raises:
            StorageError
        """
        target = os.path.join(directory, self.name)
        with storage_errors("write", target), open(target, "xb") as copy:
            copy.write(self.data)
            copy.flush()
            os.fsync(copy.fileno())


def with_own(checkpoint: str, manifest: Manifest, named: Sequence[Sidecar]) -> tuple[Sidecar, ...]:
    """Return the checkpoint's own sidecars, and those that the caller names, which replace own ones of the same name.

    The own ones are read here, and not when they are written: by then, the path may be that of another checkpoint.

    Raises:
        CorruptCheckpointError: an own one is not as it was saved.
        StorageError: it cannot be read.
    """
    own = {name for name in manifest.header.sidecars if not name.endswith(_OF_WEIGHTS)} - {one.name for one in named}
    found = (
        OwnSidecar(os.path.join(checkpoint, file.name), read_index_file(checkpoint, manifest, file))
        for file in manifest.index_files
        if file.name in own
    )
    return (*found, *named)


def sidecars_of(paths: Sequence[str | os.PathLike[str]]) -> tuple[Sidecar, ...]:
    """Return the files that the caller names.

    Raises:
        UsageError: there is no such file, it has a name of the weights, or two have one name.
    """
    if isinstance(paths, str | bytes | os.PathLike):
        raise UsageError(f"sidecars is one path, {os.fsdecode(paths)}; give a list of paths")
    found: dict[str, Sidecar] = {}
    for path in paths:
        one = Sidecar(local_path(path, "a path in sidecars (--file)"))
        if not os.path.isfile(one.path):
            what = "is a directory; name its files" if os.path.isdir(one.path) else "does not exist, or is no file"
            raise UsageError(f"{one.path}: {what} (sidecars, --file)")
        if one.name.endswith(_OF_WEIGHTS):
            raise UsageError(f"{one.path}: has the name of a file of weights; the export makes those itself")
        if (other := found.setdefault(one.name, one)) != one:
            raise UsageError(f"{other.path} and {one.path} have the same name; give one of them (sidecars, --file)")
    return tuple(found.values())
