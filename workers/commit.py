"""Commit: from a full set of receipts to a checkpoint, in the order that survives a crash at any point.

    1. each part: data written, fsync, receipt (workers.persist)
    2. index files (.metadata) and manifest.json, each synced
    3. everything that the manifest does not name (receipts, save.json, leftovers) removed, directory synced
    4. rename step-N.partial-<id> -> step-N, parent directory synced

Up to 4 the directory has a name that nothing takes for a checkpoint. Killed in 1 or 2, a commit can be done again from the
receipts; in 3 or 4, from the manifest, which is there only when every receipt was.

NOTE [ The lock on a partial directory ]
A part holds the directory's flock shared from before it looks for its receipt until the receipt is written; a commit needs
it exclusively and does not wait for it. So nobody writes into a directory that is being committed (a part that is run
again after its worker died, say), and the commit is not missed: whoever is refused sees that another part or commit is
going on, and the last one to let go of the shared lock either gets the exclusive one or is refused by somebody who got it
after that, and who therefore sees every receipt.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
from dataclasses import dataclass

import xxhash

from workers import files
from workers.directory import CheckpointInfo, checkpoint_name, partial_name, read_checkpoint
from workers.errors import CheckpointNotFoundError, CorruptCheckpointError, StorageError
from workers.faults import point
from workers.files import storage_errors
from workers.formats import get_format
from workers.job import SaveFacts
from workers.layout import Layout, deal
from workers.manifest import MANIFEST_NAME, Header, IndexFile, Manifest, parse_manifest
from workers.receipt import Receipt, read_receipt


@dataclass(frozen=True, slots=True)
class Committed:
    """A commit that is done: what is there now, and when (``time.time()``) it began and ended."""

    info: CheckpointInfo
    started: float
    ended: float
    pid: int


def already_committed(facts: SaveFacts) -> Committed | None:
    """The commit of this very save, when it has happened."""
    try:
        info, _ = read_checkpoint(facts.directory, facts.step)
    except (CheckpointNotFoundError, CorruptCheckpointError):
        return None
    now = time.time()
    return Committed(info, now, now, os.getpid()) if info.save_id == facts.save_id else None


def try_commit(facts: SaveFacts, layout: Layout) -> Committed | None:
    """Commit if every part's receipt is there; None when some are missing.

    Raises:
        StorageError, CorruptCheckpointError
    """
    started = time.time()
    partial = os.path.join(facts.directory, partial_name(facts.step, facts.save_id))
    with storage_errors("open", partial):
        try:
            directory_fd = files.open_directory(partial)
        except FileNotFoundError:
            return already_committed(facts) or _vanished(partial)
    try:
        fcntl.flock(directory_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not is_still(partial, directory_fd):
            return already_committed(facts) or _vanished(partial)
        manifest = _manifest(facts, layout, directory_fd, partial)
        if manifest is None:
            return None
        path = publish(facts, manifest, directory_fd)
    except BlockingIOError:  # see NOTE [ The lock on a partial directory ]
        return None
    finally:
        os.close(directory_fd)
    return Committed(CheckpointInfo.of(path, manifest), started, time.time(), os.getpid())


def _vanished(partial: str) -> Committed | None:
    raise StorageError(errno.ENOENT, "the partial checkpoint was removed while it was being written", partial)


def is_still(path: str, directory_fd: int) -> bool:
    """Whether the opened directory has this name (still)."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(directory_fd))
    except FileNotFoundError:
        return False


def _manifest(facts: SaveFacts, layout: Layout, directory_fd: int, partial: str) -> Manifest | None:
    """The manifest that is there, or a new one if every receipt is there."""
    data = files.read_if_exists(directory_fd, MANIFEST_NAME)
    if data is not None:
        return parse_manifest(data, os.path.join(partial, MANIFEST_NAME))
    receipts = [read_receipt(directory_fd, partial, part) for part in range(facts.num_parts)]
    whole = [receipt for receipt in receipts if receipt is not None]
    return _write_manifest(facts, layout, whole, directory_fd, partial) if len(whole) == facts.num_parts else None


def _write_manifest(
    facts: SaveFacts, layout: Layout, receipts: list[Receipt], directory_fd: int, partial: str
) -> Manifest:
    point("commit.begin")
    final = os.path.join(facts.directory, checkpoint_name(facts.step))
    index_files = []
    for name, data in get_format(facts.kind).index_files(layout, facts.save_id, final).items():
        files.write_atomically(directory_fd, partial, name, data, facts.fsync)
        index_files.append(IndexFile(name, len(data), xxhash.xxh3_128_hexdigest(data)))
    point("commit.indexed")
    manifest = Manifest(
        header=Header(facts.kind, facts.step, facts.save_id, facts.created, facts.torch, facts.stager),
        layout=layout,
        hashes=_hashes_by_item(layout, receipts),
        index_files=tuple(index_files),
    )
    files.write_atomically(directory_fd, partial, MANIFEST_NAME, manifest.to_bytes(), facts.fsync)
    point("commit.manifest")
    return manifest


def _hashes_by_item(layout: Layout, receipts: list[Receipt]) -> tuple[tuple[str, ...], ...]:
    hashes: list[list[str]] = [[] for _ in layout.items]
    for receipt, part in zip(receipts, deal(layout, len(receipts)), strict=True):
        for segment, value in zip(part, receipt.hashes, strict=True):
            hashes[segment.index].append(value)
    return tuple(map(tuple, hashes))


def publish(facts: SaveFacts, manifest: Manifest, directory_fd: int) -> str:
    """Steps 3 and 4: the directory has its manifest; give it its name. Returns the final path."""
    named = {MANIFEST_NAME, *(f.name for f in manifest.layout.files), *(f.name for f in manifest.index_files)}
    partial = os.path.join(facts.directory, partial_name(facts.step, facts.save_id))
    final = os.path.join(facts.directory, checkpoint_name(facts.step))
    with storage_errors("commit", final):
        for name in set(os.listdir(directory_fd)) - named:
            os.unlink(name, dir_fd=directory_fd)
        if facts.fsync:
            os.fsync(directory_fd)
        _rename_over(partial, final)
        if facts.fsync:
            files.sync_directory(facts.directory)
    point("commit.published")
    return final


def _rename_over(partial: str, final: str) -> None:
    """``final`` becomes what ``partial`` is. An older checkpoint of the same step is replaced in one step where the file
    system can exchange two names; elsewhere there is a moment with neither, which ``recover`` puts right."""
    try:
        os.rename(partial, final)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if not files.exchange(partial, final):
            aside = f"{partial}{'0' * 8}"  # still a partial name: it is cleaned up if we are killed now
            os.rename(final, aside)
            os.rename(partial, final)
            shutil.rmtree(aside, ignore_errors=True)
        else:
            shutil.rmtree(partial, ignore_errors=True)
