"""Which save is restored: of those that replicas are offered of, the newest that is newer than the disk and whole."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Collection, Iterable
from contextlib import suppress

from stager.ranks.messages import OfferedReplica, RestorePlan
from stager.ranks.rank_group import some_ranks
from stager.workers.checkpoint.directory.receipt import finished_ranks
from stager.workers.checkpoint.directory.run_directory import (
    CheckpointInfo,
    checkpoint_name,
    committed_steps,
    partial_name,
    read_checkpoint,
)
from stager.workers.checkpoint.read.verify import check_files, extra_files
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
        self._saves: dict[str, dict[int, OfferedReplica]] = {}  # by id; of each, the replicas by owner
        for one in offered:
            self._saves.setdefault(one.save_id, {})[one.owner] = one

    def newest_in_memory(self) -> str:
        """The id of the newest save that is whole in memory; "": there is none."""
        whole = [save for save in self._saves.values() if set(save) >= set(range(_first(save).num_ranks))]
        newest = max(whole, key=lambda save: _first(save).created, default=None)
        return "" if newest is None else _first(newest).save_id

    def pick(self, tried: Collection[RestorePlan]) -> RestorePlan | None:
        """The plan for the newest save that can be restored; None: there is none.

        Args:
            tried: plans that did not work.

        Raises:
            StorageError: the directory cannot be listed.
        """
        newest = newest_whole(self._directory, self._damaged)
        completed = {plan.save_id for plan in tried if plan.written_as == plan.save_id}
        written = {plan.save_id for plan in tried if plan.written_as != plan.save_id}
        for save in sorted(self._saves.values(), key=lambda save: _first(save).created, reverse=True):
            one = _first(save)
            if one.save_id in written:
                continue
            # The run has turned back from a save that is older than the checkpoint of an earlier step.
            if newest is not None and (one.step <= newest.step or one.created <= newest.created):
                continue
            # Parts that are on the disk may be damaged: then all are written from memory.
            is_usable = one.step not in self._damaged and one.save_id not in completed
            there = self._written(one) if is_usable else None
            missing = [rank for rank in range(one.num_ranks) if rank not in (there or ())]
            lost = [rank for rank in missing if rank not in save]
            if lost:
                logger.warning(
                    "step %d is newer than the newest checkpoint, and is in memory in part only: the part of rank %s is "
                    "missing",
                    one.step,
                    some_ranks(lost),
                )
                continue
            owners: dict[str, list[int]] = {}
            for rank in missing:
                owners.setdefault(save[rank].place, []).append(rank)
            return RestorePlan(
                one.step,
                one.save_id,
                one.save_id if there is not None else secrets.token_hex(8),
                {place: tuple(ranks) for place, ranks in owners.items()},
            )
        return None

    def _written(self, save: OfferedReplica) -> set[int] | None:
        """The ranks whose parts are in the save's partial directory; None: there is no such directory."""
        with suppress(OSError):
            return finished_ranks(os.listdir(os.path.join(self._directory, partial_name(save.step, save.save_id))))
        return None


def newest_whole(directory: str, damaged: Collection[int]) -> CheckpointInfo | None:
    """The newest checkpoint whose files are there, with their sizes; None: there is none.

    Args:
        damaged: steps known to be damaged.

    Raises:
        StorageError: the directory cannot be listed.
    """
    steps = (step for step in committed_steps(directory) if step not in damaged)
    return next((info for step in steps if (info := if_whole(directory, step)) is not None), None)


def if_whole(directory: str, step: int) -> CheckpointInfo | None:
    """The checkpoint of a step, if its files are there, with their sizes."""
    path = os.path.join(directory, checkpoint_name(step))
    with suppress(CorruptCheckpointError, StorageError):
        info, manifest = read_checkpoint(directory, step)
        if not extra_files(path, manifest) and not check_files(path, manifest, full=False):
            return info
    return None


def _first(save: dict[int, OfferedReplica]) -> OfferedReplica:
    """The first rank's replica: checkpoints are dated by that rank's clock."""
    return save[min(save)]
