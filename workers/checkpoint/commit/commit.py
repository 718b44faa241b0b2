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
import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

import xxhash

from stager.workers.checkpoint.commit.in_threads import in_threads
from stager.workers.checkpoint.commit.merge import RankContribution, merge
from stager.workers.checkpoint.directory import files, run_directory
from stager.workers.checkpoint.directory.files import is_still, storage_errors, vanished
from stager.workers.checkpoint.directory.manifest import (
    MANIFEST_NAME,
    IndexFile,
    Manifest,
    ManifestHeader,
    parse_manifest,
)
from stager.workers.checkpoint.directory.names import REPLACED, partial_name
from stager.workers.checkpoint.directory.own_files import own_files, remove_own
from stager.workers.checkpoint.directory.read_lock import holding
from stager.workers.checkpoint.directory.receipt import finished_ranks, read_receipt
from stager.workers.checkpoint.directory.run_directory import CheckpointInfo
from stager.workers.checkpoint.formats import get_format
from stager.workers.checkpoint.layout.items import Items
from stager.workers.checkpoint.layout.layout import Layout
from stager.workers.checkpoint.layout.layout_check import check_count, check_distinct
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


def already_committed(spec: SaveSpec) -> Committed | None:
    """Return the commit of this very save if it has happened, else None."""
    try:
        info, _ = run_directory.read_checkpoint_at(final_path(spec), spec.step)
    except (CheckpointNotFoundError, CorruptCheckpointError):
        return None
    now = time.time()
    return Committed(info, now, now, os.getpid()) if info.save_id == spec.save_id else None


# NOTE [ The lock on a partial directory ]
# A part holds the directory's flock shared, from before it looks for its receipt until the receipt is written. A commit
# takes the lock exclusively, and gives up at once if it cannot. So nobody writes into a directory that is being
# committed, not even a part that runs again because its worker died. And no commit is missed. Who is refused knows that
# another part or commit is going on. The last part to release the shared lock either gets the exclusive lock, or is
# refused by a process that got it later and therefore sees every receipt.
#
# The lock belongs to the directory, not to its name, and a commit changes what the name stands for: nothing, or an
# older checkpoint of the step until it is removed. So after taking the lock, a process first checks that it is not too
# late (``is_still``, ``already_committed``). It publishes a manifest only if the manifest is this save's.
@contextmanager
def locked(path: str) -> Iterator[int]:
    """Open the directory ``path`` and take its flock exclusively, without waiting. Yields the descriptor.

    Raises:
        BlockingIOError: another process holds the lock.
        OSError: the directory cannot be opened.
    """
    directory_fd = files.open_directory(path, follow=False)
    try:
        fcntl.flock(directory_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield directory_fd
    finally:
        os.close(directory_fd)  # releases the lock


def try_commit(spec: SaveSpec, layout: Layout) -> Committed | None:
    """Commit if every receipt of every rank is there. Returns None if some are missing, or if another process commits.

    Args:
        spec, layout: of one rank's contribution.

    Raises:
        InconsistentRanksError: the ranks did not save the same state.
    """
    started = time.time()
    partial, final = partial_path(spec), final_path(spec)
    with storage_errors("commit", partial), ExitStack() as stack:
        try:
            directory_fd = stack.enter_context(locked(partial))
        except FileNotFoundError:
            return already_committed(spec) or vanished(partial)
        except BlockingIOError:  # see NOTE [ The lock on a partial directory ]
            return None
        # Only with the lock: before, another process could still rename the directory.
        if not is_still(partial, directory_fd):
            return already_committed(spec) or vanished(partial)
        manifest = manifest_of(spec, layout, directory_fd)
        if manifest is None:
            return None
        # With the name exchanged, this is the older checkpoint of the step, and its manifest is not ours to publish.
        if manifest.header.save_id != spec.save_id:
            return already_committed(spec) or vanished(partial)
        put_in_place(partial, final, manifest, directory_fd, spec.fsync, num_threads=num_threads(spec.num_ranks))
    return Committed(CheckpointInfo.of(final, manifest), started, time.time(), os.getpid())


def commit_recorded(spec: SaveSpec) -> Committed | None:
    """Commit as :func:`try_commit` does, without a layout: reads it from the save record in the partial directory."""
    with storage_errors("commit", partial_path(spec)):
        try:
            own, layout = _read_record(spec, spec.rank, threading.Lock())
        except FileNotFoundError:  # step 3 has removed it: the manifest is there, only the rename is missing
            own, layout = spec, Layout((), Items.of(()), None, 1)
    return try_commit(own, layout)


# -- step 2: from receipts to a manifest ------------------------------------------------------------------------


def manifest_of(spec: SaveSpec, layout: Layout, directory_fd: int) -> Manifest | None:
    """Return the manifest; write it first if all receipts are there, else return None. The caller holds the lock."""
    partial = partial_path(spec)
    path = os.path.join(partial, MANIFEST_NAME)
    # First look for a manifest. After a crash in 3, receipts may be gone, and the manifest proves that all were there.
    data = files.read_if_exists(path)
    if data is not None:
        return parse_manifest(data, path)
    contributions = read_contributions(spec, layout, os.listdir(directory_fd))
    return None if contributions is None else _write_manifest(contributions, directory_fd, partial)


def read_contributions(spec: SaveSpec, layout: Layout, names: list[str]) -> list[RankContribution] | None:
    """Read every rank's contribution. Returns None if receipts are missing.

    Args:
        spec, layout: of the one rank whose contribution need not be read.
        names: of the files in the partial directory.
    """
    # The names decide at first: reading the files only to learn that one is missing would cost every part that.
    if sum(rank < spec.num_ranks for rank in finished_ranks(names)) < spec.num_ranks:
        return None
    partial, parsing = partial_path(spec), threading.Lock()  # the lock: NOTE [ The threads of a commit ]

    def read(rank: int) -> RankContribution | None:
        theirs, of_rank = (spec, layout) if rank == spec.rank else _read_record(spec, rank, parsing)
        parts = range(theirs.num_parts)
        receipts = [read_receipt(partial, rank, part, len(parts), spec.save_id, parsing) for part in parts]
        there = tuple(receipt for receipt in receipts if receipt is not None)
        return RankContribution(theirs, of_rank, there) if len(there) == len(parts) else None

    found = in_threads(read, range(spec.num_ranks), num_threads(spec.num_ranks))
    contributions = [contribution for contribution in found if contribution is not None]
    # Fewer: another process has removed a receipt since the names were read.
    return contributions if len(contributions) == len(found) else None


def num_threads(num_ranks: int) -> int:
    """Return how many threads read and remove the files of so many ranks. See NOTE [ The threads of a commit ]."""
    return max(1, min(_MAX_THREADS, num_ranks // _RANKS_PER_THREAD))


def _read_record(spec: SaveSpec, rank: int, parsing: threading.Lock) -> tuple[SaveSpec, Layout]:
    """Read the save record of a rank of this save."""
    path = os.path.join(partial_path(spec), record_name(rank))
    data = files.read_small(path)
    with parsing:
        theirs, layout = from_record(data, path, spec.directory)
    expected = spec.step, spec.save_id, spec.kind, spec.num_ranks, rank
    found = theirs.step, theirs.save_id, theirs.kind, theirs.num_ranks, theirs.rank
    if found != expected:
        raise CorruptCheckpointError(
            path, f"is the record of another save: (step, id, format, ranks, rank) is {found}, expected {expected}"
        )
    return theirs, layout


def _write_manifest(contributions: list[RankContribution], directory_fd: int, partial: str) -> Manifest:
    point("commit.begin")
    spec = contributions[0].spec
    layout, hashes = merge(contributions, partial)
    index_files = list(spec.sidecars)  # a worker has written and synced them (``persist.py``)
    for name, data in get_format(spec.kind).index_files(layout, spec.save_id, final_path(spec)).items():
        files.write_atomically(directory_fd, partial, name, data, spec.fsync)
        index_files.append(IndexFile(name, len(data), xxhash.xxh3_128_hexdigest(data)))
    point("commit.indexed")
    manifest = build_manifest(contributions, layout, hashes, tuple(index_files))
    document = manifest.to_bytes()
    if len(document) > files.DOCUMENT_BYTES:  # readers would refuse it, so it must not be committed
        raise StorageError(
            errno.EFBIG,
            f"the manifest of {len(layout.items):,} items takes {len(document):,} bytes; readers accept at most "
            f"{files.DOCUMENT_BYTES:,}; save fewer tensors, or shard within groups of ranks and "
            "replicate between them (docs/scale.md)",
            partial,
        )
    # Last, when the index files are durable: its presence proves that every receipt was there, and that 2 is done.
    files.write_atomically(directory_fd, partial, MANIFEST_NAME, document, spec.fsync)
    point("commit.manifest")
    return manifest


def build_manifest(
    contributions: list[RankContribution],
    layout: Layout,
    hashes: tuple[tuple[str, ...], ...],
    index_files: tuple[IndexFile, ...],
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
    return Manifest(header, layout, hashes, index_files)


# -- steps 3 to 5: from a manifest to a checkpoint --------------------------------------------------------------


def has_manifest(path: str) -> bool:
    """Return whether there is a manifest in the directory ``path``."""
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
    """Do steps 3 to 5 for a directory of any name. Whatever is at ``final`` is removed if it is ``replaceable``."""
    with storage_errors("commit", final):
        # 3. Before the rename, so that of our files a committed directory contains the checkpoint's and no others.
        unnamed = sorted(set(own_files(directory_fd)) - manifest.file_names)
        in_threads(lambda name: files.remove(os.path.join(partial, name)), unnamed, num_threads)
        if fsync:
            os.fsync(directory_fd)
        # 4. The parent's sync makes the rename durable.
        replaced = _rename_over(partial, final, replaceable)
        if fsync:
            files.sync_directory(os.path.dirname(final))
        # 5. After that sync: before it, a power failure could undo the rename, and then the old one is needed.
        if replaced is not None:
            with suppress(OSError):  # its name is that of a partial directory now; the next run removes it
                remove_own(replaced)
    point("commit.published")


def _rename_over(partial: str, final: str, replaceable: Callable[[str], bool]) -> str | None:
    """Rename ``partial`` to ``final``. Returns the new path of the older checkpoint of the step, if there was one.

    Where the file system can exchange two names, the replacement is one step. Elsewhere ``final`` does not exist for a
    moment; after a crash right then, ``recover`` renames the old one back. Anything else that is at ``final`` is not ours
    to remove, so it is renamed to ``.not-a-checkpoint-<id>``.
    """
    # With the read lock of ``final``: else retention, about to remove the old one, could remove the new one.
    with holding(final):
        if rename_onto_nothing(partial, final):
            return None
        ours = not os.path.islink(final) and replaceable(final)
        exchanged = ours and files.exchange(partial, final)
        aside = f"{partial}{REPLACED}" if ours else f"{final}.not-a-checkpoint-{partial.rpartition('-')[2]}"
        if not exchanged:
            os.rename(final, aside)
    point("commit.replaced")
    if exchanged:
        _let_the_later_one_stay(partial, final)
        return partial
    try:
        os.rename(partial, final)
    except OSError:
        os.rename(aside, final)
        raise
    return aside if ours else None


def _let_the_later_one_stay(partial: str, final: str) -> None:
    """Exchange the names again if what was replaced is from a later save of the same trainer.

    A worker is slow, or dies, and of two saves to one name the earlier is committed last. It counts as committed, and
    replaced at once. Two commits may do this at the same time: each goes on until what it has taken out is not later than
    what is there, so the latest one stays. The clock does not decide: it may have been set back.
    """
    # Without the read lock of ``final``: that is the directory whose lock this process has, so nobody removes it.
    while _is_later(run_directory.read_head(partial), run_directory.read_head(final)):
        if not files.exchange(partial, final):
            return


def _is_later(one: run_directory.Head | None, other: run_directory.Head | None) -> bool:
    return one is not None and other is not None and one.run == other.run != "" and one.number > other.number


def rename_onto_nothing(source: str, target: str) -> bool:
    """Rename ``source`` if nothing is at ``target``. Returns whether it did."""
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EISDIR):
            raise
        return False
    return True
