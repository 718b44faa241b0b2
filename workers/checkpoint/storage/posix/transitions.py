"""The transitions between the names of directories, on a file system: a rename is one step."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from stager.workers.checkpoint.documents.head import Head
from stager.workers.checkpoint.documents.names import REPLACED, not_a_checkpoint_name
from stager.workers.checkpoint.storage.posix import files
from stager.workers.checkpoint.storage.posix.heads import read_head
from stager.workers.checkpoint.storage.posix.read_lock import holding
from stager.workers.faults import point


def rename_over(partial: str, final: str, replaceable: Callable[[str], bool]) -> str | None:
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
        aside = f"{partial}{REPLACED}" if ours else _not_a_checkpoint(final, partial.rpartition("-")[2])
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
    while _is_later(read_head(partial), read_head(final)):
        if not files.exchange(partial, final):
            return


def _is_later(one: Head | None, other: Head | None) -> bool:
    return one is not None and other is not None and one.run == other.run != "" and one.number > other.number


def _not_a_checkpoint(final: str, save_id: str) -> str:
    directory, name = os.path.split(final)
    return os.path.join(directory, not_a_checkpoint_name(name, save_id))


def rename_onto_nothing(source: str, target: str) -> bool:
    """Rename ``source`` if nothing is at ``target``. Returns whether it did."""
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EISDIR):
            raise
        return False
    return True
