"""Which save is restored: of those that replicas are offered of, the newest that is newer than the disk and whole."""

from __future__ import annotations

import logging
import os
import secrets
from collections import defaultdict
from collections.abc import Collection, Iterable
from contextlib import suppress

from stager.ranks.messages import OfferedReplica, RestorePlan
from stager.ranks.rank_group import some_ranks
from stager.workers.checkpoint.directory.run_directory import CheckpointInfo, committed_steps, path_of, read_checkpoint
from stager.workers.checkpoint.documents.names import partial_name
from stager.workers.checkpoint.documents.receipt import finished_ranks
from stager.workers.checkpoint.read.verify import check_files
from stager.workers.errors import CorruptCheckpointError, StorageError

logger = logging.getLogger("stager")


class Candidates:
    """The saves that replicas are offered of.

    Args:
        directory: of the run.
        offered: the replicas of all hosts.
        damaged: steps whose checkpoints are known to be damaged.
    """

    def __init__(self, directory: str, offered: Iterable[OfferedReplica], damaged: Collection[int]) -> None:
        self._directory = directory
        self._damaged = damaged
        by_id: defaultdict[str, dict[int, OfferedReplica]] = defaultdict(dict)  # of each save, the replicas by owner
        for one in offered:
            by_id[one.save_id][one.owner] = one
        self._newest_first = sorted(by_id.values(), key=lambda save: _first(save).created, reverse=True)

    def newest_in_memory(self) -> str:
        """The id of the newest save that is whole in memory; "": there is none."""
        for save in self._newest_first:
            one = _first(save)
            if all(rank in save for rank in range(one.num_ranks)):
                return one.save_id
        return ""

    def pick(self, tried: Collection[RestorePlan]) -> RestorePlan | None:
        """The plan for the newest save that can be restored; None: there is none.

        Args:
            tried: plans that did not work.

        Raises:
            StorageError: the directory cannot be listed.
        """
        newest = newest_whole(self._directory, self._damaged)
        for save in self._newest_first:
            one = _first(save)
            # The run has turned back from a save that is older than the checkpoint of an earlier step.
            if newest is None or (one.step > newest.step and one.created > newest.created):
                if (plan := self._plan(save, one, tried)) is not None:
                    return plan
        return None

    def _plan(
        self, replicas: dict[int, OfferedReplica], save: OfferedReplica, tried: Collection[RestorePlan]
    ) -> RestorePlan | None:
        """Plan how to restore a save. Returns None if it was tried in every way, or if parts of it are lost.

        The first way keeps the parts that are on the disk, and writes the others from memory under the save's own id. The
        second writes all parts from memory under a new id, because what is on the disk may be damaged.

        Args:
            replicas: the offered ones of this save, by the rank whose part they are.
            save: any of them; it says which save that is.
            tried: plans that did not work.
        """
        tried_ids = {plan.written_as for plan in tried if plan.save_id == save.save_id}
        if tried_ids - {save.save_id}:  # the second way was tried
            return None
        on_disk = None if save.step in self._damaged or tried_ids else self._ranks_on_disk(save)
        missing = [rank for rank in range(save.num_ranks) if rank not in (on_disk or ())]
        if lost := [rank for rank in missing if rank not in replicas]:
            logger.warning(
                "step %d is newer than the newest checkpoint, but memory holds only a part of it: the part of rank %s is "
                "missing",
                save.step,
                some_ranks(lost),
            )
            return None
        owners: defaultdict[str, tuple[int, ...]] = defaultdict(tuple)  # by the memory that has their replicas
        for rank in missing:
            owners[replicas[rank].place] += (rank,)
        written_as = save.save_id if on_disk is not None else secrets.token_hex(8)
        return RestorePlan(save.step, save.name, save.save_id, written_as, dict(owners))

    def _ranks_on_disk(self, save: OfferedReplica) -> set[int] | None:
        """The ranks whose parts are in the save's partial directory; None: there is no such directory."""
        with suppress(OSError):
            return finished_ranks(os.listdir(os.path.join(self._directory, partial_name(save.name, save.save_id))))
        return None


def newest_whole(directory: str, damaged: Collection[int]) -> CheckpointInfo | None:
    """The newest checkpoint, but for ``damaged`` steps, whose files are there with their sizes; None: there is none.

    Raises:
        StorageError: the directory cannot be listed.
    """
    steps = (step for step in committed_steps(directory) if step not in damaged)
    return next((info for step in steps if (info := if_whole(directory, step)) is not None), None)


def if_whole(directory: str, step: int) -> CheckpointInfo | None:
    """The checkpoint of a step, if its files are there, with their sizes."""
    path = path_of(directory, step)
    with suppress(CorruptCheckpointError, StorageError):
        info, manifest = read_checkpoint(directory, step)
        if not check_files(path, manifest, full=False):
            return info
    return None


def _first(save: dict[int, OfferedReplica]) -> OfferedReplica:
    """The first rank's replica: checkpoints are dated by that rank's clock."""
    return save[min(save)]
