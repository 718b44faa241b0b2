"""Which save is restored: of those whose replicas are offered, the newest that is newer than the disk and whole."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class Offered:
    """A replica that some host keeps.

    Attributes:
        offer: which host's offer it is in.
        owner, step, save_id, num_ranks, created: whose, and of which save.
    """

    offer: int
    owner: int
    step: int
    save_id: str
    num_ranks: int
    created: float


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be written, and by whom.

    Attributes:
        step, save_id: of the save.
        written_as: the id under which it is written.
        owners: for each offer, those whose shares its host writes.
    """

    step: int
    save_id: str
    written_as: str
    owners: dict[int, list[int]]


class Candidates:
    """The saves of which something is offered.

    Args:
        directory: of the run.
        offered: by all hosts.
        damaged: steps whose checkpoints are known to be.
    """

    def __init__(self, directory: str, offered: Iterable[Offered], damaged: Collection[int]) -> None:
        self._directory = directory
        self._damaged = damaged
        self._saves: dict[str, dict[int, Offered]] = {}  # by id; of each, the shares by owner
        for one in offered:
            self._saves.setdefault(one.save_id, {})[one.owner] = one

    def newest_in_memory(self) -> str:
        """The id of the newest save that is there entirely; "": there is none."""
        whole = [save for save in self._saves.values() if set(save) >= set(range(_first(save).num_ranks))]
        newest = max(whole, key=lambda save: _first(save).created, default=None)
        return "" if newest is None else _first(newest).save_id

    def pick(self, tried: Collection[Plan]) -> Plan | None:
        """
        Args:
            tried: what did not work.
        """
        newest = newest_whole(self._directory, self._damaged)
        completed = {plan.save_id for plan in tried if plan.written_as == plan.save_id}
        written = {plan.save_id for plan in tried if plan.written_as != plan.save_id}
        for save in sorted(self._saves.values(), key=lambda save: _first(save).created, reverse=True):
            one = _first(save)
            if one.save_id in written:
                continue
            # One that is older than a checkpoint of an earlier step is what the run has turned back from.
            if newest is not None and (one.step <= newest.step or one.created <= newest.created):
                continue
            # What was written of it may be damaged: then everything is written from memory.
            is_usable = one.step not in self._damaged and one.save_id not in completed
            there = self._written(one) if is_usable else None
            missing = [rank for rank in range(one.num_ranks) if rank not in (there or ())]
            lost = [rank for rank in missing if rank not in save]
            if lost:
                logger.warning(
                    "step %d is newer than the newest checkpoint, and is in memory in part only: what is missing is that "
                    "of rank %s",
                    one.step,
                    some_ranks(lost),
                )
                continue
            owners: dict[int, list[int]] = {}
            for rank in missing:
                owners.setdefault(save[rank].offer, []).append(rank)
            return Plan(one.step, one.save_id, one.save_id if there is not None else secrets.token_hex(8), owners)
        return None

    def _written(self, save: Offered) -> set[int] | None:
        """The ranks whose share is in the save's partial directory; None: there is no such directory."""
        with suppress(OSError):
            return finished_ranks(os.listdir(os.path.join(self._directory, partial_name(save.step, save.save_id))))
        return None


def newest_whole(directory: str, damaged: Collection[int]) -> CheckpointInfo | None:
    """The newest checkpoint whose files are there, with their sizes; None: there is none.

    Args:
        damaged: steps known to be.

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


def _first(save: dict[int, Offered]) -> Offered:
    """Of the first rank: its clock is the one that checkpoints are dated by."""
    return save[min(save)]
