"""What this rank tells the others of a save, and what it hears from them.

Nothing is posted while the store cannot be reached: the other ranks then see the directory.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from stager.ranks import keys
from stager.ranks.messages import EveryPartWritten, NewestStep, SaveCommitted, SaveFailed
from stager.ranks.rank_group import RankGroup
from stager.workers.checkpoint.commit.commit import Committed, final_path
from stager.workers.checkpoint.write.save_spec import SaveSpec
from stager.workers.errors import InternalError, RankFailedError, StagerError, StorageError, WithdrawnError

_MAX_HELPERS = 3  # where locks do not reach from host to host, each commits anew


class SaveMessages:
    """The messages of saves, posted to a group and read from it. A group of one has nobody to tell."""

    def __init__(self, group: RankGroup) -> None:
        self._group = group

    def post_committed(self, committed: Committed) -> None:
        """Post the whole commit: the checkpoint may be replaced or removed before another rank has looked."""
        if self._group.is_alone:  # else a message per save would stay in memory
            return
        with suppress(RankFailedError):
            # The end first: a rank that reads NEWEST may already ask how that save ended.
            self._group.post(keys.save_end(committed.info.save_id), SaveCommitted(committed))
            self._group.post(keys.NEWEST, NewestStep(committed.info.step))

    def post_found(self, committed: Committed) -> None:
        """Post a commit that this rank found, unless its end is posted: then ``NEWEST`` may be a later step by now."""
        with suppress(RankFailedError):
            if self._group.read(keys.save_end(committed.info.save_id)) is None:
                self.post_committed(committed)

    def post_failed(self, save_id: str, error: BaseException) -> None:
        """Post that the save failed on this rank."""
        rank = self._group.rank
        self.post_failure(save_id, f"failed on rank {rank}: {type(error).__name__}: {error}", (rank,))

    def post_withdrawn(self, save_id: str, why: str) -> None:
        """Post that the save's checkpoint was deleted: the save ends without it, and that is no failure."""
        if not self._group.is_alone:
            self.post_failure(save_id, why, (), is_withdrawn=True)

    def post_failure(
        self,
        save_id: str,
        why: str,
        ranks: Sequence[int],
        *,
        is_unfinished: bool = False,
        is_withdrawn: bool = False,
    ) -> None:
        """Post why a save failed, and which ranks are to blame. The first rank's message stands: see ``SaveFailed``."""
        with suppress(RankFailedError):
            # The barrier first: the others may still wait there for this rank to agree on who writes what.
            self._group.cancel_barrier(keys.agreement(save_id), f"the save {why}", ranks)
            self._group.post_first(keys.save_end(save_id), SaveFailed(why, tuple(ranks), is_unfinished, is_withdrawn))

    def post_every_part(self, save_id: str) -> None:
        """Post that only the commit is missing."""
        with suppress(RankFailedError):
            self._group.post(keys.every_part(save_id), EveryPartWritten())

    def every_part_is_written(self, save_id: str) -> bool:
        """Whether another rank has posted that only the commit is missing."""
        with suppress(RankFailedError):
            return self._group.read(keys.every_part(save_id)) is not None
        return False

    def claims_commit(self, save_id: str) -> bool:
        """Whether this rank may help to commit: several may, because a helper may die, too."""
        with suppress(RankFailedError):
            return self._group.count(keys.commit_helpers(save_id)) <= _MAX_HELPERS
        return False

    def end(self, spec: SaveSpec) -> Committed | SaveFailed | None:
        """How a save ended, with the path as this host sees it; None if no rank has posted its end.

        Raises:
            RankFailedError: the store cannot be reached.
        """
        message = self._group.read(keys.save_end(spec.save_id))
        if message is None or isinstance(message, SaveFailed):
            return message
        if not isinstance(message, SaveCommitted):
            raise InternalError(f"{message} is no end of a save")
        return replace(message.committed, info=replace(message.committed.info, path=final_path(spec)))

    def first_failure(self, spec: SaveSpec, error: BaseException) -> BaseException:
        """The error that made a save fail: another rank's, if this rank's ``error`` is that its directory was removed.

        A rank posts why a save fails before it removes the directory, so that reason can be read by now.
        """
        if isinstance(error, StorageError) and error.errno == errno.ENOENT:
            with suppress(RankFailedError):
                if isinstance(end := self.end(spec), SaveFailed):
                    return rank_failure(end, spec)
        return error


def rank_failure(end: SaveFailed, spec: SaveSpec) -> StagerError:
    """The error of a save that failed on another rank, or was withdrawn there."""
    if end.is_withdrawn:
        return WithdrawnError(end.error)
    return RankFailedError(f"the save of step {spec.step} {end.error}", end.ranks)
