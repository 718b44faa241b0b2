"""Commit: from a full set of receipts to a checkpoint, in the order that survives a crash at any point.

    1. each part of each rank: data written, fsync, receipt (stager.workers.checkpoint.commit.persist)
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

The lock belongs to the directory, not to its name, and a commit changes what the name stands for: nothing, or, when an
older checkpoint of the step was replaced, that older one until it is removed. So whoever has the lock asks next whether
he is too late (``is_still``, ``already_committed``), and a manifest is only published if it is this save's.

NOTE [ The threads of a commit ]
Of many ranks there are many small files, and each is a wait for the file system. So records and receipts are read, and
removed, in threads (``num_threads``), which have all ended before the next step: what is removed is removed before the
sync, and that before the rename. What was read is parsed by one thread at a time: more would only take the interpreter from
each other, which costs a fifth of the time.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

import xxhash

from stager.workers.checkpoint.commit.in_threads import in_threads
from stager.workers.checkpoint.commit.merge import RankContribution, merge
from stager.workers.checkpoint.directory import files
from stager.workers.checkpoint.directory.files import is_still, storage_errors
from stager.workers.checkpoint.directory.manifest import (
    MANIFEST_NAME,
    IndexFile,
    Manifest,
    ManifestHeader,
    parse_manifest,
)
from stager.workers.checkpoint.directory.read_lock import holding
from stager.workers.checkpoint.directory.receipt import finished_ranks, read_receipt
from stager.workers.checkpoint.directory.run_directory import (
    REPLACED,
    CheckpointInfo,
    checkpoint_name,
    partial_name,
    read_checkpoint,
)
from stager.workers.checkpoint.formats import get_format
from stager.workers.checkpoint.layout.layout import Layout
from stager.workers.checkpoint.layout.layout_check import check_count, check_distinct
from stager.workers.checkpoint.write.save_record import from_record, record_name
from stager.workers.checkpoint.write.save_spec import SaveSpec
from stager.workers.errors import CheckpointNotFoundError, CorruptCheckpointError, StorageError
from stager.workers.faults import point

_MAX_THREADS = 32
_RANKS_PER_THREAD = 4  # fewer are read in less time than a thread is worth


@dataclass(frozen=True, slots=True)
class Committed:
    """A commit that is done: what is there now, and when (``time.time()``) it began and ended."""

    info: CheckpointInfo
    started: float
    ended: float
    pid: int


def already_committed(spec: SaveSpec) -> Committed | None:
    """The commit of this very save, when it has happened."""
    try:
        info, _ = read_checkpoint(spec.directory, spec.step)
    except (CheckpointNotFoundError, CorruptCheckpointError):
        return None
    now = time.time()
    return Committed(info, now, now, os.getpid()) if info.save_id == spec.save_id else None


def try_commit(spec: SaveSpec, layout: Layout) -> Committed | None:
    """Commit if every part's receipt, of every rank, is there; None when some are missing.

    Args:
        spec, layout: of one rank's contribution.

    Raises:
        InconsistentRanksError: the ranks did not save the same state.
        StorageError, CorruptCheckpointError
    """
    started = time.time()
    partial = partial_path(spec)
    with storage_errors("commit", partial):
        try:
            directory_fd = files.open_directory(partial, follow=False)
        except FileNotFoundError:
            return already_committed(spec) or vanished(partial)
        try:
            fcntl.flock(directory_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not is_still(partial, directory_fd):
                return already_committed(spec) or vanished(partial)
            manifest = manifest_of(spec, layout, directory_fd)
            if manifest is None:
                return None
            if manifest.header.save_id != spec.save_id:
                return already_committed(spec) or vanished(partial)
            path = publish(spec, manifest, directory_fd)
        except BlockingIOError:  # see NOTE [ The lock on a partial directory ]
            return None
        finally:
            os.close(directory_fd)
    return Committed(CheckpointInfo.of(path, manifest), started, time.time(), os.getpid())


def commit_recorded(spec: SaveSpec) -> Committed | None:
    """As :func:`try_commit`, for who has no layout: what is needed is in the partial directory.

    Raises:
        StorageError, CorruptCheckpointError, InconsistentRanksError
    """
    with storage_errors("commit", partial_path(spec)):
        try:
            own, layout = _read_record(spec, spec.rank, threading.Lock())
        except FileNotFoundError:  # gone, as it is when the manifest is there and only the rename is missing
            own, layout = spec, Layout((), (), None, 1)
    return try_commit(own, layout)


def partial_path(spec: SaveSpec) -> str:
    return os.path.join(spec.directory, partial_name(spec.step, spec.save_id))


def vanished(partial: str) -> NoReturn:
    raise StorageError(errno.ENOENT, "the partial checkpoint was removed while it was being written", partial)


def manifest_of(spec: SaveSpec, layout: Layout, directory_fd: int) -> Manifest | None:
    """The manifest that is there, or a new one if every receipt is there. The caller holds the lock."""
    partial = partial_path(spec)
    path = os.path.join(partial, MANIFEST_NAME)
    data = files.read_if_exists(path)
    if data is not None:
        return parse_manifest(data, path)
    contributions = read_contributions(spec, layout, os.listdir(directory_fd))
    return None if contributions is None else _write_manifest(contributions, directory_fd, partial)


def read_contributions(spec: SaveSpec, layout: Layout, names: list[str]) -> list[RankContribution] | None:
    """Every rank's; None when some are not written yet.

    Args:
        spec, layout: of the contribution that is known without being read.
        names: of what is in the partial directory.
    """
    if sum(rank < spec.num_ranks for rank in finished_ranks(names)) < spec.num_ranks:
        return None

    parsing = threading.Lock()

    def read(rank: int) -> RankContribution | None:
        own = (spec, layout) if rank == spec.rank else _read_record(spec, rank, parsing)
        return _read_contribution(*own, parsing)

    found = in_threads(read, range(spec.num_ranks), num_threads(spec.num_ranks))
    contributions = [contribution for contribution in found if contribution is not None]
    return contributions if len(contributions) == len(found) else None  # or some were taken away meanwhile


def num_threads(num_ranks: int) -> int:
    """See NOTE [ The threads of a commit ]."""
    return max(1, min(_MAX_THREADS, num_ranks // _RANKS_PER_THREAD))


def _read_record(spec: SaveSpec, rank: int, parsing: threading.Lock) -> tuple[SaveSpec, Layout]:
    """What a rank of this save contributes."""
    partial = partial_path(spec)
    path = os.path.join(partial, record_name(rank))
    data = files.read_small(path)
    with parsing:
        theirs, layout = from_record(data, path, spec.directory)
    expected = spec.step, spec.save_id, spec.kind, spec.num_ranks, rank
    found = theirs.step, theirs.save_id, theirs.kind, theirs.num_ranks, theirs.rank
    if found != expected:
        raise CorruptCheckpointError(path, f"is a record of {found}, not of {expected}")
    return theirs, layout


def _read_contribution(spec: SaveSpec, layout: Layout, parsing: threading.Lock) -> RankContribution | None:
    partial = partial_path(spec)
    receipts = []
    for part in range(spec.num_parts):
        receipt = read_receipt(partial, spec.rank, part, spec.num_parts, spec.save_id, parsing)
        if receipt is None:
            return None
        receipts.append(receipt)
    return RankContribution(spec, layout, tuple(receipts))


def _write_manifest(contributions: list[RankContribution], directory_fd: int, partial: str) -> Manifest:
    point("commit.begin")
    spec = contributions[0].spec
    layout, hashes = merge(contributions, partial)
    final = os.path.join(spec.directory, checkpoint_name(spec.step))
    index_files = []
    for name, data in get_format(spec.kind).index_files(layout, spec.save_id, final).items():
        files.write_atomically(directory_fd, partial, name, data, spec.fsync)
        index_files.append(IndexFile(name, len(data), xxhash.xxh3_128_hexdigest(data)))
    point("commit.indexed")
    manifest = build_manifest(contributions, layout, hashes, tuple(index_files))
    document = manifest.to_bytes()
    if len(document) > files.DOCUMENT_BYTES:  # it would be committed, and never be read
        raise StorageError(
            errno.EFBIG,
            f"the manifest of {len(layout.items):,} items takes {len(document):,} bytes, and {files.DOCUMENT_BYTES:,} "
            "are read; save fewer tensors, or shard within groups of ranks and replicate between them (docs/scale.md)",
            partial,
        )
    files.write_atomically(directory_fd, partial, MANIFEST_NAME, document, spec.fsync)
    point("commit.manifest")
    return manifest


def build_manifest(
    contributions: list[RankContribution],
    layout: Layout,
    hashes: tuple[tuple[str, ...], ...],
    index_files: tuple[IndexFile, ...],
) -> Manifest:
    """What the receipts prove, as a manifest.

    Args:
        layout, hashes: of all contributions together.

    Raises:
        CorruptCheckpointError: records or receipts, each possible, are not together: nobody would read the manifest.
    """
    spec = contributions[0].spec
    receipts = [receipt for contribution in contributions for receipt in contribution.receipts]
    linked_bytes = sum(receipt.linked_bytes for receipt in receipts)
    try:
        check_count(linked_bytes)
        check_distinct([MANIFEST_NAME, *(f.name for f in layout.files), *(f.name for f in index_files)])
    except ValueError as error:
        raise CorruptCheckpointError(partial_path(spec), f"cannot be committed: {error}") from error
    return Manifest(
        header=ManifestHeader(
            kind=spec.kind,
            step=spec.step,
            save_id=spec.save_id,
            created=spec.created,
            torch=spec.torch,
            stager=spec.stager,
            linked_bytes=linked_bytes,
            generation=max(receipt.generation for receipt in receipts),
        ),
        layout=layout,
        hashes=hashes,
        index_files=index_files,
    )


def publish(spec: SaveSpec, manifest: Manifest, directory_fd: int) -> str:
    """Steps 3 and 4: the directory has its manifest; give it its name. Returns the final path."""
    final = os.path.join(spec.directory, checkpoint_name(spec.step))
    threads = num_threads(spec.num_ranks)
    put_in_place(partial_path(spec), final, manifest, directory_fd, spec.fsync, num_threads=threads)
    point("commit.published")
    return final


def has_manifest(path: str) -> bool:
    return os.path.lexists(os.path.join(path, MANIFEST_NAME))


def put_in_place(
    partial: str,
    final: str,
    manifest: Manifest,
    directory_fd: int,
    fsync: bool,
    replaceable: Callable[[str], bool] = has_manifest,
    num_threads: int = 1,
) -> None:
    """Steps 3 and 4, whatever the directory is called. What is at ``final`` is removed if it is ``replaceable``."""
    with storage_errors("commit", final):
        unnamed = sorted(set(os.listdir(directory_fd)) - manifest.file_names)
        in_threads(lambda name: files.remove(os.path.join(partial, name)), unnamed, num_threads)
        if fsync:
            os.fsync(directory_fd)
        replaced = _rename_over(partial, final, replaceable)
        if fsync:
            files.sync_directory(os.path.dirname(final))
        if replaced is not None:  # only now: until then a power failure may bring it back under its old name
            with suppress(OSError):  # it is a partial directory by its name; the next run tries again
                files.remove(replaced)


def _rename_over(partial: str, final: str, replaceable: Callable[[str], bool]) -> str | None:
    """``final`` becomes what ``partial`` is. Returns where the older checkpoint of the step is now, if there was one.

    It is replaced in one step where the file system can exchange two names; elsewhere there is a moment with neither,
    which ``recover`` puts right. What is in the way and is no checkpoint is not ours to remove: it is moved aside.
    """
    with holding(final):  # or retention, about to remove the old one, could take the new one in its place
        if _rename_onto_nothing(partial, final):
            return None
        ours = not os.path.islink(final) and replaceable(final)
        exchanged = ours and files.exchange(partial, final)
        aside = f"{partial}{REPLACED}" if ours else f"{final}.not-a-checkpoint-{partial.rpartition('-')[2]}"
        if not exchanged:
            os.rename(final, aside)
    point("commit.replaced")
    if exchanged:
        return partial
    try:
        os.rename(partial, final)
    except OSError:
        os.rename(aside, final)
        raise
    return aside if ours else None


def _rename_onto_nothing(partial: str, final: str) -> bool:
    """False: something is in the way."""
    try:
        os.rename(partial, final)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        return False
    return True
