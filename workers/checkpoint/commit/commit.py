"""Commit: turn a full set of receipts into a checkpoint, in an order that survives a crash at any point.

    1. Each part of each rank writes its data, syncs it, and leaves a receipt (``persist.py``).
    2. Whoever sees the last receipt writes the index files (.metadata), then manifest.json, and syncs each.
    3. It removes everything of ours that the manifest does not name (receipts, save records, leftovers), and syncs the
       directory.
    4. It renames step-N.partial-<id> to step-N, and syncs the parent directory. Only now is there a checkpoint.
    5. If step-N existed, it removes the old one.

Until 4 the directory has a name that no reader takes for a checkpoint. After a crash in 1 or 2 the commit starts again from
the receipts; after a crash in 3 or 4, from the manifest.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass

import xxhash

from stager.workers.checkpoint.commit.merge import RankContribution, merge
from stager.workers.checkpoint.directory import run_directory
from stager.workers.checkpoint.directory.manifest_file import has_manifest
from stager.workers.checkpoint.directory.run_directory import CheckpointInfo
from stager.workers.checkpoint.documents.manifest import (
    MANIFEST_NAME,
    IndexFile,
    Manifest,
    ManifestHeader,
    parse_manifest,
)
from stager.workers.checkpoint.documents.names import partial_name
from stager.workers.checkpoint.documents.receipt import Receipt, finished_ranks, parse_receipt, receipt_name
from stager.workers.checkpoint.formats import get_format
from stager.workers.checkpoint.layout.items import Items
from stager.workers.checkpoint.layout.layout import Layout
from stager.workers.checkpoint.layout.layout_check import check_count, check_distinct
from stager.workers.checkpoint.storage.entry import Entry
from stager.workers.checkpoint.storage.in_threads import in_threads
from stager.workers.checkpoint.storage.places import storage_of
from stager.workers.checkpoint.storage.posix import files
from stager.workers.checkpoint.storage.posix.files import storage_errors, vanished
from stager.workers.checkpoint.write.save_spec import SaveSpec
from stager.workers.checkpoint.write.write_task import from_record, record_name
from stager.workers.errors import CheckpointNotFoundError, CorruptCheckpointError, StorageError
from stager.workers.faults import point

# NOTE [ The threads of a commit ]
# Many ranks leave many small files, and for each one the process waits for the file system. So several threads
# (``num_threads``) read and remove save records and receipts. All of them end before the next step begins, so the order
# above holds. Only one thread at a time parses what was read: more would compete for the interpreter, which costs a fifth of
# the time.
_MAX_THREADS = 32
_UNWATCHED: AbstractContextManager[object] = nullcontext()
_RANKS_PER_THREAD = 4  # for fewer ranks, starting a thread costs more than it saves


@dataclass(frozen=True, slots=True)
class Committed:
    """A finished commit: the checkpoint, when the commit began and ended (``time.time()``), and the process that did it."""

    info: CheckpointInfo
    started: float
    ended: float
    pid: int


def partial_path(spec: SaveSpec) -> str:
    """Return the path of the save's partial directory."""
    return os.path.join(spec.directory, partial_name(spec.final_name, spec.save_id))


def final_path(spec: SaveSpec) -> str:
    """Return the path of the checkpoint's directory."""
    return os.path.join(spec.directory, spec.final_name)


def partial_file_names(spec: SaveSpec) -> list[str]:
    """Return the names of the files in the save's partial directory. Raises OSError."""
    with storage_of(spec.directory).open(partial_path(spec)) as entry:
        return entry.names()


def already_committed(spec: SaveSpec) -> Committed | None:
    """Return the commit of this very save if it has happened, else None."""
    try:
        info, _ = run_directory.read_checkpoint_at(final_path(spec), spec.step)
    except (CheckpointNotFoundError, CorruptCheckpointError):
        return None
    now = time.time()
    return Committed(info, now, now, os.getpid()) if info.save_id == spec.save_id else None


# NOTE [ The lock on a partial directory ]
# A part holds the directory's lock shared, from before it looks for its receipt until the receipt is written. A commit
# takes the lock exclusively, and gives up at once if it cannot. So nobody writes into a directory that is being
# committed, not even a part that runs again because its worker died. And no commit is missed. Who is refused knows that
# another part or commit is going on. The last part to release the shared lock either gets the exclusive lock, or is
# refused by a process that got it later and therefore sees every receipt.
#
# The lock belongs to the directory, not to its name, and a commit changes what the name stands for: nothing, or an
# older checkpoint of the step until it is removed. So after taking the lock, a process first checks that it is not too
# late (``is_still``, ``already_committed``). It publishes a manifest only if the manifest is this save's.


def try_commit(spec: SaveSpec, layout: Layout) -> Committed | None:
    """Commit if every receipt of every rank is there. Returns None if some are missing, or if another process commits.

    Args:
        spec, layout: of one rank's contribution.

    Raises:
        InconsistentRanksError: the ranks did not save the same state.
    """
    started = time.time()
    partial, final = partial_path(spec), final_path(spec)
    with storage_errors("commit", partial):
        storage = storage_of(spec.directory)
        try:
            entry = storage.open(partial)
        except FileNotFoundError:
            return already_committed(spec) or vanished(partial)
        with entry:
            if not entry.try_lock():  # see NOTE [ The lock on a partial directory ]
                return None
            # Only with the lock: before, another process could still rename the directory.
            if not entry.is_still():
                return already_committed(spec) or vanished(partial)
            manifest = manifest_of(spec, layout, entry)
            if manifest is None:
                return None
            # With the name exchanged, this is the older checkpoint of the step, and its manifest is not ours to publish.
            if manifest.header.save_id != spec.save_id:
                return already_committed(spec) or vanished(partial)
            storage.check_holder(spec.directory, manifest.header.run)
            put_in_place(entry, final, manifest, spec.fsync, num_threads=num_threads(spec.num_ranks))
    return Committed(CheckpointInfo.of(final, manifest), started, time.time(), os.getpid())


def commit_recorded(spec: SaveSpec) -> Committed | None:
    """Commit as :func:`try_commit` does, without a layout: reads it from the save record in the partial directory."""
    with storage_errors("commit", partial_path(spec)):
        try:
            with storage_of(spec.directory).open(partial_path(spec)) as entry:
                own, layout = _read_record(spec, spec.rank, entry, _UNWATCHED)
        except FileNotFoundError:  # step 3 has removed it: the manifest is there, only the rename is missing
            own, layout = spec, Layout((), Items.of(()), None, 1)
    return try_commit(own, layout)


# -- step 2: from receipts to a manifest ------------------------------------------------------------------------


def manifest_of(spec: SaveSpec, layout: Layout, entry: Entry) -> Manifest | None:
    """Return the manifest; write it first if all receipts are there, else return None. The caller holds the lock."""
    # First look for a manifest. After a crash in 3, receipts may be gone, and the manifest proves that all were there.
    data = entry.read(MANIFEST_NAME)
    if data is not None:
        return parse_manifest(data, os.path.join(entry.path, MANIFEST_NAME))
    contributions = read_contributions(spec, layout, entry)
    return None if contributions is None else _write_manifest(contributions, entry)


def read_receipt(
    entry: Entry,
    rank: int,
    part: int,
    num_parts: int,
    save_id: str,
    parsing: AbstractContextManager[object] = _UNWATCHED,
) -> Receipt | None:
    """Read the receipt of ``part``. Returns None if it does not exist yet.

    Args:
        parsing: entered while the receipt is parsed: a lock, if several threads read.

    Raises:
        CorruptCheckpointError: it is damaged, or of another save.
    """
    name = receipt_name(rank, part, num_parts)
    data = entry.read(name)
    if data is None:
        return None
    with parsing:
        return parse_receipt(data, os.path.join(entry.path, name), rank, part, num_parts, save_id)


def read_contributions(spec: SaveSpec, layout: Layout, entry: Entry) -> list[RankContribution] | None:
    """Read every rank's contribution. Returns None if receipts are missing.

    Args:
        spec, layout: of the one rank whose contribution need not be read.
        entry: the partial directory.
    """
    # The names decide at first: reading the files only to learn that one is missing would cost every part that.
    if sum(rank < spec.num_ranks for rank in finished_ranks(entry.names())) < spec.num_ranks:
        return None
    parsing = threading.Lock()  # NOTE [ The threads of a commit ]

    def read(rank: int) -> RankContribution | None:
        theirs, of_rank = (spec, layout) if rank == spec.rank else _read_record(spec, rank, entry, parsing)
        parts = range(theirs.num_parts)
        receipts = [read_receipt(entry, rank, part, len(parts), spec.save_id, parsing) for part in parts]
        there = tuple(receipt for receipt in receipts if receipt is not None)
        return RankContribution(theirs, of_rank, there) if len(there) == len(parts) else None

    found = in_threads(read, range(spec.num_ranks), num_threads(spec.num_ranks))
    contributions = [contribution for contribution in found if contribution is not None]
    # Fewer: another process has removed a receipt since the names were read.
    return contributions if len(contributions) == len(found) else None


def num_threads(num_ranks: int) -> int:
    """Return how many threads read and remove the files of so many ranks. See NOTE [ The threads of a commit ]."""
    return max(1, min(_MAX_THREADS, num_ranks // _RANKS_PER_THREAD))


def _read_record(
    spec: SaveSpec, rank: int, entry: Entry, parsing: AbstractContextManager[object]
) -> tuple[SaveSpec, Layout]:
    """Read the save record of a rank of this save. Raises FileNotFoundError if it is not there."""
    path = os.path.join(entry.path, record_name(rank))
    data = entry.read(record_name(rank))
    if data is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    with parsing:
        theirs, layout = from_record(data, path, spec.directory)
    expected = spec.step, spec.save_id, spec.kind, spec.num_ranks, rank
    found = theirs.step, theirs.save_id, theirs.kind, theirs.num_ranks, theirs.rank
    if found != expected:
        raise CorruptCheckpointError(
            path, f"is the record of another save: (step, id, format, ranks, rank) is {found}, expected {expected}"
        )
    return theirs, layout


def _write_manifest(contributions: list[RankContribution], entry: Entry) -> Manifest:
    point("commit.begin")
    spec = contributions[0].spec
    layout, hashes = merge(contributions, entry.path)
    index_files = list(spec.sidecars)  # a worker has written and synced them (``persist.py``)
    for name, data in get_format(spec.kind).index_files(layout, spec.save_id, final_path(spec)).items():
        entry.put(name, data, sync=spec.fsync)
        index_files.append(IndexFile(name, len(data), xxhash.xxh3_128_hexdigest(data)))
    point("commit.indexed")
    manifest = build_manifest(contributions, layout, hashes, tuple(index_files), entry.stripes(layout))
    document = manifest.to_bytes()
    if len(document) > files.DOCUMENT_BYTES:  # readers would refuse it, so it must not be committed
        raise StorageError(
            errno.EFBIG,
            f"the manifest of {len(layout.items):,} items takes {len(document):,} bytes; readers accept at most "
            f"{files.DOCUMENT_BYTES:,}; save fewer tensors, or shard within groups of ranks and "
            "replicate between them (docs/scale.md)",
            entry.path,
        )
    # Last, when the index files are durable: its presence proves that every receipt was there, and that 2 is done.
    entry.put(MANIFEST_NAME, document, sync=spec.fsync)
    point("commit.manifest")
    return manifest


def build_manifest(
    contributions: list[RankContribution],
    layout: Layout,
    hashes: tuple[tuple[str, ...], ...],
    index_files: tuple[IndexFile, ...],
    stripes: tuple[tuple[int, ...], ...] = (),
) -> Manifest:
    """Make the manifest that the receipts prove, given layout and hashes of all contributions together."""
    spec = contributions[0].spec
    receipts = [receipt for contribution in contributions for receipt in contribution.receipts]
    linked_bytes = sum(receipt.linked_bytes for receipt in receipts)
    generation = max(receipt.generation for receipt in receipts)
    try:  # records and receipts may not fit together, and readers would refuse the manifest
        check_count(linked_bytes)
        check_distinct([MANIFEST_NAME, *(f.name for f in layout.files), *(f.name for f in index_files)])
    except ValueError as error:
        raise CorruptCheckpointError(partial_path(spec), f"cannot be committed: {error}") from error
    header = ManifestHeader(
        kind=spec.kind,
        step=spec.step,
        save_id=spec.save_id,
        created=spec.created,
        torch=spec.torch,
        stager=spec.stager,
        linked_bytes=linked_bytes,
        generation=generation,
        metrics=dict(spec.metrics),
        name=spec.name,
        run=spec.run,
        number=spec.number,
        sidecars=tuple(file.name for file in spec.sidecars),
    )
    return Manifest(header, layout, hashes, index_files, stripes)


# -- steps 3 to 5: from a manifest to a checkpoint --------------------------------------------------------------


def put_in_place(
    entry: Entry,
    final: str,
    manifest: Manifest,
    fsync: bool,
    replaceable: Callable[[str], bool] = has_manifest,
    num_threads: int = 1,
) -> None:
    """Do steps 3 to 5 for a directory of any name. Whatever is at ``final`` is removed if it is ``replaceable``."""
    storage = storage_of(final)
    with storage_errors("commit", final):
        # 3. Before the rename, so that of our files a committed directory contains the checkpoint's and no others.
        entry.remove_unnamed(manifest.file_names, num_threads)
        if fsync:
            entry.sync()
        # 4. The parent's sync makes the rename durable.
        replaced = storage.publish(entry, final, replaceable)
        if fsync:
            storage.sync(os.path.dirname(final))
        # 5. After that sync: before it, a power failure could undo the rename, and then the old one is needed.
        if replaced is not None:
            with suppress(OSError):  # its name is that of a partial directory now; the next run removes it
                storage.remove(replaced)
    point("commit.published")
