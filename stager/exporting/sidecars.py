"""Files that lie beside exported weights: the configuration of the model, those of its tokenizer."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass

from stager.workers.checkpoint.directory.files import open_regular, storage_errors
from stager.workers.checkpoint.directory.paths import local_path
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


def sidecars_of(paths: Sequence[str | os.PathLike[str]]) -> tuple[Sidecar, ...]:
    """Return the files that are copied: those that the caller names.

    A manifest lists no such files yet. When it does, they come first here, and one that the caller names replaces the one of
    the same name.

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
