"""An object store as a storage. NOTE [ Commit without a rename ] in this folder's ``__init__.py`` is how it commits."""

from __future__ import annotations

import errno
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext, suppress

from stager.workers.checkpoint.documents.head import Head, parse_head
from stager.workers.checkpoint.documents.manifest import MANIFEST_NAME, Manifest, parse_manifest
from stager.workers.checkpoint.documents.names import is_data
from stager.workers.checkpoint.storage.data_file import DataFile
from stager.workers.checkpoint.storage.entry import Entry
from stager.workers.checkpoint.storage.in_threads import in_threads
from stager.workers.checkpoint.storage.objects.client import Client, split
from stager.workers.checkpoint.storage.objects.decision import Decision, decide, is_being_removed
from stager.workers.checkpoint.storage.objects.head_of import head_of
from stager.workers.checkpoint.storage.objects.keys import (
    Place,
    Standing,
    decisions,
    join,
    name_when,
    parse_data,
    place_of,
    removals,
)
from stager.workers.checkpoint.storage.objects.object_entry import ObjectEntry, missing
from stager.workers.checkpoint.storage.objects.run_lease import (
    LOCK_NAME,
    holder_of,
    join_lease,
    renewing,
    take_lease,
    without_holder,
)
from stager.workers.checkpoint.storage.objects.striped_file import StripedFile
from stager.workers.checkpoint.storage.run_lock import RunLock
from stager.workers.checkpoint.storage.storage import Fingerprint, Guarantees, Storage
from stager.workers.errors import CorruptCheckpointError, DirectoryInUseError, InternalError, StorageError
from stager.workers.faults import point

# What a manifest becomes for the moment between the decision to remove it and its end. A number behind it says whose it is.
_TOMBSTONE = b"removed "
_TOMBSTONE_BYTES = 64
_TOMBSTONE_SECS = 10.0
_POLL_SECS = 0.2
_AT_ONCE = 16  # small requests, each of which mostly waits


class ObjectStore(Storage):
    """Every bucket that obstore can reach. Paths are URLs, ``s3://bucket/run``. For the methods see :class:`Storage`."""

    guarantees = Guarantees(links=False, quarantine=False, foreign_files=False)
    reads_at_once = 32

    # -- what is there

    def names(self, directory: str) -> list[str]:
        client, root = split(directory)
        prefixes, _ = client.list_directory(root)
        saves = {prefix: save for prefix in prefixes if (save := parse_data(prefix)) is not None}
        committed = [prefix for prefix in prefixes if prefix not in saves and not prefix.startswith(".")]
        return committed + self._unfinished(client, root, list(saves.values()), set(committed))

    def _unfinished(self, client: Client, root: str, saves: list[tuple[str, str]], committed: set[str]) -> list[str]:
        """Return the names of the saves that are not those of the checkpoints. Asks once for each checkpoint."""
        names = sorted({name for name, _ in saves} & committed)
        heads = in_threads(lambda name: head_of(client, Place(Standing.CHECKPOINT, root, name, "")), names, _AT_ONCE)
        ids = {name: head.save_id for name, head in zip(names, heads, strict=True) if head is not None}
        others = [(name, save_id) for name, save_id in saves if ids.get(name) != save_id]

        def named(save: tuple[str, str]) -> str:
            is_removed = is_being_removed(client, Place(Standing.PARTIAL, root, *save))
            return name_when(Standing.REMOVING if is_removed else Standing.PARTIAL, *save)

        return in_threads(named, others, _AT_ONCE)

    def checkpoint_names(self, directory: str) -> list[str]:
        client, root = split(directory)
        prefixes, _ = client.list_directory(root)
        return [prefix for prefix in prefixes if parse_data(prefix) is None and not prefix.startswith(".")]

    def removing_names(self, directory: str) -> list[str]:
        client, root = split(directory)
        _, objects = client.list_directory(removals(root))
        saves = [parse_data(found.key.rpartition("/")[2]) for found in objects]
        return [name_when(Standing.REMOVING, *save) for save in saves if save is not None]

    def has_directory(self, path: str) -> bool:
        client, key = split(path)
        prefixes, objects = client.list_directory(key)
        return bool(prefixes or objects)

    def exists(self, path: str) -> bool:
        client, key = split(path)
        place = place_of(key)
        if place.standing is Standing.CHECKPOINT:
            return client.exists(place.manifest)
        if is_being_removed(client, place):
            return place.standing is Standing.REMOVING
        return place.standing is Standing.PARTIAL and self._is_begun(client, place)

    def _is_begun(self, client: Client, place: Place) -> bool:
        """Return whether a save has objects, and is not committed."""
        if next(client.walk(place.data()), None) is None:
            return False
        head = head_of(client, place)
        return head is None or head.save_id != place.save_id

    def free_bytes(self, directory: str) -> int:
        return sys.maxsize

    # -- a checkpoint, by its path

    def file_names(self, path: str) -> list[str]:
        client, key = split(path)
        prefixes, objects = client.list_directory(key)
        return prefixes + [found.key.rpartition("/")[2] for found in objects]

    def has_manifest(self, path: str) -> bool:
        client, key = split(path)
        return client.exists(place_of(key).manifest)

    def nbytes(self, path: str) -> int:
        return self.exclusive_bytes([path])

    def read_manifest(self, path: str) -> bytes:
        client, key = split(path)
        data = client.get(place_of(key).manifest)
        if data.startswith(_TOMBSTONE):
            raise missing(path)
        return data

    def head(self, path: str) -> Head | None:
        client, key = split(path)
        return head_of(client, place_of(key))

    def file_of_ours(self, path: str) -> str | None:
        return None

    def read_file(self, path: str, manifest: Manifest, name: str) -> bytes:
        client, key = split(path)
        return client.get(join(place_of(key).data(manifest.header.save_id), name))

    def open_data(self, path: str, manifest: Manifest, file: int) -> DataFile:
        client, key = split(path)
        spec = manifest.layout.files[file]
        if len(manifest.stripes) != len(manifest.layout.files):
            raise CorruptCheckpointError(
                os.path.join(path, MANIFEST_NAME),
                "is of a checkpoint in a file system, and was copied here by another program; use stager copy",
            )
        data = place_of(key).data(manifest.header.save_id)
        return StripedFile(client, data, spec.name, spec.nbytes, manifest.stripes[file])

    def check_data(self, path: str, manifest: Manifest) -> None:
        client, key = split(path)
        entry = ObjectEntry(client, path, place_of(key), manifest.header.save_id)
        if entry.stripes(manifest.layout) != manifest.stripes:
            raise CorruptCheckpointError(path, "has other stripes than its manifest names")

    def reading(self, path: str) -> AbstractContextManager[bool]:
        return nullcontext(True)

    def fingerprint(self, path: str) -> Fingerprint:
        """Size and ETag of each object."""
        client, key = split(path)
        place = place_of(key)
        manifest = client.head(place.manifest)
        head = head_of(client, place)
        found = {MANIFEST_NAME: (manifest.nbytes, manifest.etag)}
        if head is not None:
            data = place.data(head.save_id)
            found |= {one.key[len(data) + 1 :]: (one.nbytes, one.etag) for one in client.walk(data)}
        return found

    def committed_at(self, path: str) -> float:
        client, key = split(path)
        return client.head(place_of(key).manifest).modified

    # -- a save

    def create(self, path: str) -> Entry:
        client, key = split(path)
        place = place_of(key)
        return ObjectEntry(client, path, place, place.save_id)

    def open(self, path: str) -> Entry:
        client, key = split(path)
        place = place_of(key)
        if place.standing is Standing.CHECKPOINT:
            head = head_of(client, place)
            if head is None:
                raise missing(path)
            return ObjectEntry(client, path, place, head.save_id)
        if not self.exists(path):
            raise missing(path)
        return ObjectEntry(client, path, place, place.save_id)

    def make(self, path: str) -> None:
        client, key = split(path)
        place = place_of(key)
        if place.standing is not Standing.REMOVING:
            raise InternalError(f"{path}: nothing of this kind is made empty in an object store")
        decide(client, place, Decision.WITHDRAW)

    def rename(self, source: str, target: str) -> bool:
        client, key = split(source)
        place, to = place_of(key), place_of(split(target)[1])
        if to.standing is not Standing.REMOVING:
            raise InternalError(f"{source} cannot become {target} in an object store")
        if place.standing is Standing.CHECKPOINT:
            return self._retract(client, place, source)
        if not self._is_begun(client, place) or decide(client, place, Decision.WITHDRAW)[0] is Decision.COMMIT:
            raise missing(source)
        return True

    def removing_path(self, path: str) -> str:
        client, key = split(path)
        head = head_of(client, place_of(key))
        if head is None:
            raise missing(path)
        directory, name = os.path.split(path)
        return os.path.join(directory, name_when(Standing.REMOVING, name, head.save_id))

    def _retract(self, client: Client, place: Place, path: str) -> bool:
        """Take the name of a checkpoint from it: mark its data, then let the manifest go."""
        found = client.get_version(place.manifest)
        head = parse_head(found.data)
        if head is None:
            raise missing(path)
        # 1. Before the manifest goes: otherwise nobody would know, after a crash, that these data must not be committed.
        client.put(place.removal(head.save_id), b"")
        point("objects.marked")
        # 2. Only this manifest: a commit may have put another one there. A delete cannot say so, a write can.
        tombstone = _TOMBSTONE + secrets.token_hex(8).encode()
        if not client.replace(place.manifest, tombstone, found.version):
            there = self._start_of(client, place)
            if there != tombstone:  # else it is one's own write, whose answer was lost
                return self._was_first(client, place, head.save_id, there, path)
        point("objects.retracted")
        # 3. Nobody replaces the tombstone meanwhile: a commit waits until it is gone (_put_manifest).
        client.delete([place.manifest])
        return True

    def _was_first(self, client: Client, place: Place, save_id: str, there: bytes, path: str) -> bool:
        """Return False if a commit has replaced the checkpoint. Raises FileNotFoundError if somebody else removes it.

        The mark may be somebody else's, too, and is right in both cases: nobody needs the data any more.
        """
        if not there or there.startswith(_TOMBSTONE):
            if next(client.walk(place.data(save_id)), None) is None:  # removed, and the mark with it
                client.delete([place.removal(save_id)])
            raise missing(path)
        head = head_of(client, place)
        if head is not None and head.save_id == save_id:  # the store refused for a reason of its own
            client.delete([place.removal(save_id)])
        return False

    def publish(self, entry: Entry, final: str, replaceable: Callable[[str], bool]) -> str | None:
        if not isinstance(entry, ObjectEntry):
            raise InternalError(f"{entry.path} is no directory in an object store")
        client, place = entry.client, place_of(split(final)[1])
        document = entry.read(MANIFEST_NAME)
        if document is None:
            raise missing(entry.path)
        # 2. Whoever was first has decided.
        decision, is_first = decide(client, place, Decision.COMMIT, entry.save_id)
        if decision is Decision.WITHDRAW or client.exists(place.removal(entry.save_id)):
            raise missing(entry.path)
        point("objects.decided")
        # 3. All data are there, also if this process was stopped for a long time.
        manifest = parse_manifest(document, os.path.join(entry.path, MANIFEST_NAME))
        if entry.stripes(manifest.layout) != manifest.stripes:
            raise CorruptCheckpointError(entry.path, "has other stripes than its manifest names")
        # 4. There is a checkpoint.
        replaced = self._put_manifest(client, place, document)
        point("commit.replaced")
        if not is_first and is_being_removed(client, place, entry.save_id):
            raise missing(entry.path)
        # 5.
        self._tidy(client, place, entry.save_id)
        if replaced is None:
            return None
        client.put(place.removal(replaced.save_id), b"")
        directory, name = os.path.split(final)
        return os.path.join(directory, name_when(Standing.REMOVING, name, replaced.save_id))

    def _put_manifest(self, client: Client, place: Place, document: bytes) -> Head | None:
        """Write the manifest of a checkpoint. Returns the head of the one that is not needed any more, if there is one."""
        ours = parse_head(document)
        if ours is None:
            raise InternalError("a manifest was made that has no head")
        deadline = time.monotonic() + _TOMBSTONE_SECS
        while True:
            try:
                found = client.get_version(place.manifest)
            except FileNotFoundError:
                if client.create(place.manifest, document):
                    return None
                continue
            there = parse_head(found.data)
            if there is not None and there.save_id == ours.save_id:  # our own, or another process has helped
                return None
            if there is not None and there.run == ours.run != "" and there.number > ours.number:
                return ours
            if found.data.startswith(_TOMBSTONE) and time.monotonic() < deadline:
                time.sleep(_POLL_SECS)
                continue
            if client.replace(place.manifest, document, found.version):
                return there

    def _tidy(self, client: Client, place: Place, save_id: str) -> None:
        """Do step 5. The decision goes last: it tells the next run that something is left."""
        client.delete([join(place.data(save_id), MANIFEST_NAME)])
        client.delete([place.decision(save_id)])

    def tidy(self, directory: str) -> None:
        client, root = split(directory)
        _, objects = client.list_directory(decisions(root))
        for save in (parse_data(found.key.rpartition("/")[2]) for found in objects):
            if save is not None:
                name, save_id = save
                place = Place(Standing.CHECKPOINT, root, name, "")
                head = head_of(client, place)
                if head is not None and head.save_id == save_id:
                    self._tidy(client, place, save_id)
                elif next(client.walk(place.data(save_id)), None) is None:  # withdrawn before anything was written
                    client.delete([place.decision(save_id), place.removal(save_id)])

    def put_back(self, source: str, final: str) -> None:
        raise InternalError(f"{source}: in an object store a checkpoint is replaced in one step")

    def sync(self, directory: str) -> None:
        return

    # -- the run's lock, and its small files

    def lock(self, directory: str, timeout: float, nonce: str = "", *, shared: bool = False) -> RunLock:
        client, root = split(directory)
        take = join_lease if shared else take_lease
        return take(client, join(root, LOCK_NAME), timeout, nonce or secrets.token_hex(8), directory)

    def lock_nonce(self, directory: str) -> str:
        client, root = split(directory)
        with suppress(StorageError):
            return holder_of(client, join(root, LOCK_NAME))
        return ""

    def unused(self, directory: str) -> AbstractContextManager[None]:
        client, root = split(directory)
        return without_holder(client, join(root, LOCK_NAME), directory)

    def check_holder(self, directory: str, nonce: str) -> None:
        client, root = split(directory)
        holder = holder_of(client, join(root, LOCK_NAME))
        if nonce and holder not in ("", nonce):
            raise DirectoryInUseError(
                errno.EWOULDBLOCK,
                "this save is not committed: another run has taken the lock of its directory, because this one did not "
                "renew it in time (the process was stopped, or did not reach the store)",
                directory,
            )

    def working(self, directory: str, nonce: str) -> AbstractContextManager[None]:
        client, root = split(directory, is_known=True)
        return renewing(client, join(root, LOCK_NAME), nonce)

    def prepare(self, directory: str) -> None:
        split(directory)  # prefixes need not be made, but the bucket has to be there
        if is_data(os.path.basename(directory)):
            raise StorageError(
                errno.EINVAL, "no run can have this name: it ends as the data of a save do; choose another", directory
            )

    def read_run_file(self, directory: str, name: str) -> bytes | None:
        client, root = split(directory)
        try:
            return client.get(join(root, name))
        except FileNotFoundError:
            return None

    def change_run_file(self, directory: str, name: str, change: Callable[[bytes | None], bytes]) -> None:
        client, root = split(directory)
        key = join(root, name)
        while True:
            try:
                found = client.get_version(key)
            except FileNotFoundError:
                if client.create(key, change(None)):
                    return
            else:
                if client.replace(key, change(found.data), found.version):
                    return

    # -- a removal

    def why_not_removable(self, path: str) -> str | None:
        return None

    def remove(self, path: str) -> str | None:
        client, key = split(path)
        place = place_of(key)
        if place.standing is Standing.CHECKPOINT:
            raise InternalError(f"{path} is a checkpoint, whose name has to be taken first")
        data = place.data()
        if place.standing is Standing.PARTIAL:
            if not self._is_begun(client, place):
                return None
            if decide(client, place, Decision.WITHDRAW)[0] is Decision.COMMIT and not self._gives_up(client, place):
                return None
        self._remove_tombstone(client, place)
        keys = [found.key for found in client.walk(data)]
        point("prune.removing")
        client.delete(keys)
        # Last: as long as one of them is there, nobody takes what is left for a save that could be committed.
        client.delete([place.decision(), place.removal()])
        return None

    def _remove_tombstone(self, client: Client, place: Place) -> None:
        """Finish the removal of a name that another process began (:meth:`_retract`), and did not live to end."""
        if self._start_of(client, place).startswith(_TOMBSTONE):
            client.delete([place.manifest])

    def _start_of(self, client: Client, place: Place) -> bytes:
        """Return the first bytes of a manifest, all of a tombstone; b"": there is none."""
        try:
            return client.get_start(place.manifest, _TOMBSTONE_BYTES)
        except FileNotFoundError:
            return b""

    def _gives_up(self, client: Client, place: Place) -> bool:
        """Mark a save that was to be committed and cannot be. Returns False if it is committed after all."""
        client.put(place.removal(), b"")
        head = head_of(client, place)
        if head is not None and head.save_id == place.save_id:
            client.delete([place.removal()])
            return False
        return True

    def exclusive_bytes(self, paths: Iterable[str]) -> int:
        total = 0
        for path in paths:
            client, key = split(path)
            place = place_of(key)
            save_id = place.save_id
            with suppress(FileNotFoundError):
                if not save_id:
                    head = head_of(client, place)
                    save_id = "" if head is None else head.save_id
                total += sum(found.nbytes for found in client.walk(place.data(save_id))) if save_id else 0
        return total
