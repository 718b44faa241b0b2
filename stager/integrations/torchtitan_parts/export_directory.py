"""Where an export lies until it has its name, ``.hf_export`` in the folder of the checkpoints, and how it gets the name.

    weights                 the staged weights, a checkpoint that workers write
    new-ID/step-1000        the files of weights; after the two names were exchanged, what had the name before
    former-ID/step-1000     where the file system cannot exchange names: what had the name before

So at each moment what had the name has it, or the export does, whole; where names cannot be exchanged, nothing has it for a
moment, and :meth:`ExportDirectory.put_back` of the next run gives it back. What is no longer needed is removed afterwards.
What is not stager's to remove is set aside, as for a save: ``.step-~1000.not-a-checkpoint-ID``.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
from collections.abc import Collection, Iterator
from contextlib import suppress

from stager.exporting.new_directory import refuse_if_taken
from stager.integrations.torchtitan_parts.contents import step_of
from stager.workers.checkpoint.directory.manifest_file import has_own_manifest
from stager.workers.checkpoint.directory.protected import read_protected
from stager.workers.checkpoint.documents.names import not_a_checkpoint_name, removing_name
from stager.workers.checkpoint.storage.places import storage_of
from stager.workers.checkpoint.storage.posix import files
from stager.workers.checkpoint.storage.posix.files import storage_errors
from stager.workers.checkpoint.storage.posix.read_lock import holding
from stager.workers.checkpoint.storage.posix.transitions import rename_onto_nothing
from stager.workers.errors import CorruptCheckpointError, UsageError
from stager.workers.faults import point

logger = logging.getLogger("stager")

_NAME = ".hf_export"
_NEW, _FORMER = "new-", "former-"
_OURS = re.compile(rf"(?:{_NEW}|{_FORMER})[0-9a-f]{{16}}")


class ExportDirectory:
    """The directory for exports beside the checkpoints. One rank uses it, and it has the lock of the folder.

    Args:
        folder: of the checkpoints, absolute.
        protected: steps whose checkpoints the configuration protects.

    Attributes:
        folder: of the checkpoints.
        weights: where the weights are staged.
    """

    def __init__(self, folder: str, protected: Collection[int] = ()) -> None:
        self.folder, self._protected = folder, protected
        self._path = os.path.join(folder, _NAME)
        self.weights = os.path.join(self._path, "weights")

    def new(self, name: str) -> str:
        """Return a path for the files of weights that are to get a name in the folder."""
        return os.path.join(self._made(_NEW), name)

    def publish(self, new: str) -> None:
        """Give an export its name in the folder. What had the name is then removed, or set aside.

        Raises:
            StorageError: nothing was changed.
        """
        final = self._final(new)
        with storage_errors("write", final):
            former = self._take_name(new, final)
            files.sync_directory(self.folder)
        point("hf_export.named")
        if former is not None:
            self._dispose(former)

    def put_back(self) -> None:
        """Put back what a killed export has left without its name, and remove or set aside what is not needed.

        Raises:
            StorageError: something could not be put back.
        """
        for path in (*self._left(_FORMER), *self._left(_NEW)):
            if step_of(path) is None:  # an export that was not whole
                self._remove(path)
                continue
            final = self._final(path)
            with storage_errors("write", final):
                is_back = not os.path.lexists(final) and rename_onto_nothing(path, final)
            if is_back:
                logger.warning("%s is put back: an export was killed before it had the name", final)
            else:
                self._dispose(path)
        for entry in self._entries():
            with suppress(OSError):  # something is left in it
                os.rmdir(os.path.join(self._path, entry))
        with suppress(OSError):  # staged weights are in it, or it is not there
            os.rmdir(self._path)

    def clear(self) -> None:
        """Remove the staged weights, and the directory if nothing else is left in it."""
        for entry in self._entries():
            path = os.path.join(self._path, entry)
            if _OURS.fullmatch(entry) is None:
                self._remove(path)
            with suppress(OSError):
                os.rmdir(path)
        with suppress(OSError):
            os.rmdir(self._path)

    def _take_name(self, new: str, final: str) -> str | None:
        """Give an export its name. Returns where that is now which had the name; None: nothing had it."""
        with holding(final):  # else retention, about to remove what is there, could remove the export
            if rename_onto_nothing(new, final):
                return None
            if files.exchange(new, final):
                return new
            former = os.path.join(self._made(_FORMER), os.path.basename(final))
            os.rename(final, former)
            point("hf_export.between")
            try:
                os.rename(new, final)
            except OSError:
                os.rename(former, final)
                raise
            return former

    def _dispose(self, path: str) -> None:
        """Remove what an export has replaced, or set it aside. An error is a warning: the export has its name."""
        name = os.path.basename(path)
        try:
            if _is_export(path):
                files.remove(path)
            elif self._is_removable(path):
                doomed = os.path.join(self.folder, removing_name(name, secrets.token_hex(8)))
                os.rename(path, doomed)  # from here on stager removes it, also after a crash
                storage_of(doomed).remove(doomed)
            else:
                aside = os.path.join(self.folder, not_a_checkpoint_name(name, secrets.token_hex(8)))
                os.rename(path, aside)
                logger.warning("%s: what had this name is now %s", self._final(path), aside)
        except OSError as error:
            logger.warning("%s could not be removed: %s", path, error)

    def _is_removable(self, path: str) -> bool:
        """Tell whether it is a checkpoint of stager's that is not protected."""
        if os.path.islink(path) or not has_own_manifest(path):
            return False
        with suppress(CorruptCheckpointError):  # of a damaged list: nothing may be removed then
            return step_of(path) not in {*self._protected, *read_protected(self.folder)}
        return False

    def _remove(self, path: str) -> None:
        try:
            files.remove(path)
        except OSError as error:
            logger.warning("%s could not be removed: %s", path, error)

    def _made(self, kind: str) -> str:
        path = os.path.join(self._path, f"{kind}{secrets.token_hex(8)}")
        with storage_errors("create", path):
            os.makedirs(path)
        return path

    def _left(self, kind: str) -> Iterator[str]:
        for entry in self._entries():
            if entry.startswith(kind) and _OURS.fullmatch(entry) is not None:
                path = os.path.join(self._path, entry)
                with storage_errors("list", path):
                    yield from (os.path.join(path, name) for name in sorted(os.listdir(path)))

    def _entries(self) -> list[str]:
        with storage_errors("list", self._path):
            try:
                return sorted(os.listdir(self._path))
            except FileNotFoundError:
                return []

    def _final(self, path: str) -> str:
        return os.path.join(self.folder, os.path.basename(path))


def _is_export(path: str) -> bool:
    """Tell whether it is an export of weights with nothing else in it."""
    try:
        refuse_if_taken(path, force=True)
    except UsageError:
        return False
    return True
