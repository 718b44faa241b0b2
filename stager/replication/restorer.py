"""When a run begins, or finds its newest checkpoint damaged: what is in the partners' memory, and not on the disk, becomes
a checkpoint.

every host     offers what it keeps
rank 0         picks the newest save that is newer than what is on the disk, and of which every rank's share is either
               offered, or already in the save's partial directory
its keepers    write the shares that are missing, as their owners would have; the last one commits

From then on it is a checkpoint like any other: durable, verified, loaded by any number of ranks.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
from collections.abc import Collection, Iterable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass

from stager.ranks.job import Job, some_ranks
from stager.replication.replicas import Replica, Replicas
from stager.staging.replication import partners
from workers.directory import CheckpointInfo, checkpoint_name, committed_steps, partial_name, read_checkpoint
from workers.errors import CorruptCheckpointError, RankFailedError, ReplicationError, StagerError, StorageError
from workers.persist import PartResult, discard_partial
from workers.pool import WorkerPool
from workers.receipt import finished_ranks
from workers.recover import recover
from workers.replica import check_replica, persist_replica
from workers.verify import check_files, extra_files

logger = logging.getLogger("stager")


@dataclass(frozen=True, slots=True)
class _Offered:
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
class _Plan:
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


class Restorer:
    """
    Args:
        job: with a board.
        directory: of the run, absolute.
        replicas: of this host.
        pool: whose workers write.
    """

    def __init__(self, job: Job, directory: str, replicas: Replicas, pool: WorkerPool) -> None:
        assert job.board is not None
        self._job = job
        self._board = job.board
        self._directory = directory
        self._replicas = replicas
        self._pool = pool
        self._times = 0

    def open(self) -> str:
        """When the run begins, before anything is saved: restore what can be, then tidy the directory up. Every rank
        calls it.

        Returns:
            The id of the newest save that is whole in memory; "": there is none.

        Raises:
            RankFailedError: a rank did not come.
        """
        whole_id, _ = self._restore(frozenset())
        if self._job.leads:
            for found in recover(self._directory):
                logger.warning("%s left by an earlier run: %s (%s)", found.name, found.outcome.value, found.reason)
            newest = newest_whole(self._directory, ())
            self._board.post("replicas/newest", str(-1 if newest is None else newest.step).encode())
        self._job.meet("replicas/opened", f"tidying up {self._directory}")
        self._remove_strangers(whole_id, int(self._read("replicas/newest")))
        return whole_id

    def restore(self, damaged: int) -> bool:
        """The checkpoint of this step is damaged: restore it, or a newer one. Every rank calls it. Whether that was done.

        Raises:
            RankFailedError: a rank did not come.
        """
        return self._restore(frozenset((damaged,)))[1]

    def _restore(self, damaged: Collection[int]) -> tuple[str, bool]:
        self._times += 1
        head = f"replicas/restore/{self._times}"
        place, number = self._offer(head)
        self._job.meet(head, "looking for replicas")
        offered = self._read_offers(head) if self._job.leads else []
        tried: list[_Plan] = []
        while True:
            at = f"{head}/{len(tried)}"
            plan = self._agree_on(at, offered, damaged, tried)
            if plan is None:
                return self._whole_id(head, offered), False
            try:
                self._write(plan, self._mine(head, place, number, plan))
            except StagerError as error:
                logger.warning("step %d is not restored from memory: %s", plan.step, error)
            self._job.meet(f"{at}/written", f"restoring step {plan.step} from memory")
            if self._is_done(at, plan):
                return self._whole_id(head, offered), True
            tried.append(plan)

    def _is_done(self, at: str, plan: _Plan) -> bool:
        """Every rank is told the same."""
        if self._job.leads:
            found = _if_whole(self._directory, plan.step)
            is_done = found is not None and found.save_id == plan.written_as
            self._board.post(f"{at}/result", b"done" if is_done else b"failed")
            if is_done:
                logger.warning(
                    "%s was not whole on the disk; shares of %d ranks were written from their partners' memory",
                    checkpoint_name(plan.step),
                    sum(map(len, plan.owners.values())),
                )
            elif plan.written_as != plan.save_id:  # nobody else knows of it
                with suppress(StorageError):
                    discard_partial(self._directory, plan.step, plan.written_as)
        return self._read(f"{at}/result") == b"done"

    # -- what there is ------------------------------------------------------------------------------------------

    def _offer(self, head: str) -> tuple[str, int]:
        """Which memory this is, and this rank's number among those that see the same; number 0 offers what is in it."""
        found = os.stat(self._replicas.path)
        place = f"{socket.gethostname()}/{found.st_dev}/{found.st_ino}"
        self._board.post(f"{head}/place/{self._job.rank}", place.encode())
        number = self._board.add(f"{head}/places/{place}") - 1
        if number == 0:
            offer = self._board.add(f"{head}/offers")
            rows = [
                [replica.owner, facts.step, facts.save_id, facts.num_ranks, facts.created]
                for replica in self._replicas.whole()
                for facts in (replica.header.facts,)
            ]
            self._board.post(f"{head}/offer/{offer}", json.dumps(rows).encode())
            self._board.post(f"{head}/offer-of/{place}", str(offer).encode())
        return place, number

    def _mine(self, head: str, place: str, number: int, plan: _Plan) -> list[Replica]:
        """What this rank writes of what the plan wants of its host: the ranks there share the work."""
        owners = plan.owners.get(int(self._read(f"{head}/offer-of/{place}")), [])
        mine = owners[number :: self._board.add(f"{head}/places/{place}", 0)]
        if not mine:
            return []
        found = {r.owner: r for r in self._replicas.whole() if r.header.facts.save_id == plan.save_id}
        lost = [owner for owner in mine if owner not in found]
        if lost:
            raise ReplicationError(f"the replicas of rank {some_ranks(lost)} are not there any more")
        return [found[owner] for owner in mine]

    def _read_offers(self, head: str) -> list[_Offered]:
        return [
            _Offered(number, *row)
            for number in range(1, self._board.add(f"{head}/offers", 0) + 1)
            for row in json.loads(self._read(f"{head}/offer/{number}"))
        ]

    def _whole_id(self, head: str, offered: Iterable[_Offered]) -> str:
        """Of the newest save that is in memory entirely, so that it is not overwritten before another one is."""
        key = f"{head}/whole"
        if self._job.leads:
            shares = _by_save(offered)
            whole = [save for save in shares.values() if set(save) >= set(range(_first(save).num_ranks))]
            newest = max(whole, key=lambda save: _first(save).created, default=None)
            self._board.post(key, b"" if newest is None else _first(newest).save_id.encode())
        return self._read(key).decode()

    # -- what to do ---------------------------------------------------------------------------------------------

    def _agree_on(
        self, at: str, offered: list[_Offered], damaged: Collection[int], tried: Collection[_Plan]
    ) -> _Plan | None:
        if self._job.leads:
            try:
                plan = self._pick(offered, damaged, tried)
            except StagerError as error:
                logger.warning("nothing is restored from memory: %s", error)
                plan = None
            note = None if plan is None else [plan.step, plan.save_id, plan.written_as, list(plan.owners.items())]
            self._board.post(f"{at}/plan", json.dumps(note).encode())
            return plan
        note = json.loads(self._read(f"{at}/plan"))
        return None if note is None else _Plan(note[0], note[1], note[2], dict(note[3]))

    def _pick(self, offered: list[_Offered], damaged: Collection[int], tried: Collection[_Plan]) -> _Plan | None:
        newest = newest_whole(self._directory, damaged)
        completed = {plan.save_id for plan in tried if plan.written_as == plan.save_id}
        written = {plan.save_id for plan in tried} - completed
        saves = sorted(_by_save(offered).values(), key=lambda save: _first(save).created, reverse=True)
        for save in saves:
            one = _first(save)
            if one.save_id in written:
                continue
            # One that is older than a checkpoint of an earlier step is what the run has turned back from.
            if newest is not None and (one.step <= newest.step or one.created <= newest.created):
                continue
            # What was written of it may be damaged: then everything is written from memory.
            is_usable = one.step not in damaged and one.save_id not in completed
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
            return _Plan(one.step, one.save_id, one.save_id if there is not None else secrets.token_hex(8), owners)
        return None

    def _written(self, save: _Offered) -> set[int] | None:
        """The ranks whose share is in the save's partial directory; None: there is no such directory."""
        with suppress(OSError):
            return finished_ranks(os.listdir(os.path.join(self._directory, partial_name(save.step, save.save_id))))
        return None

    def _write(self, plan: _Plan, replicas: Collection[Replica]) -> None:
        """The shares that this host has.

        Raises:
            StagerError
        """
        for future in [self._pool.submit(check_replica, replica.path) for replica in replicas]:
            future.result()
        parts: list[Future[PartResult]] = [
            self._pool.submit(persist_replica, replica.path, part, self._directory, plan.written_as)
            for replica in replicas
            for part in range(replica.header.facts.num_parts)
        ]
        errors = [error for part in parts if (error := part.exception()) is not None]
        if errors:
            raise errors[0]

    def _remove_strangers(self, whole_id: str, newest: int) -> None:
        """Replicas of ranks that nobody on this host keeps any more: there are fewer ranks, or they sit elsewhere.

        Args:
            whole_id: of the newest save that is in memory entirely, which stays if the disk does not have it.
            newest: step of the newest checkpoint on the disk.
        """
        head = f"replicas/restore/{self._times}"
        here = self._board.read(f"{head}/place/{self._job.rank}")
        for path, owner in self._replicas.files():
            keeper = partners(owner, self._job.num_ranks)[0] if owner < self._job.num_ranks else None
            if keeper is None or self._board.read(f"{head}/place/{keeper}") != here:
                header = self._replicas.read(path)
                if header is None or header.facts.save_id != whole_id or header.facts.step <= newest:
                    self._replicas.remove(path)

    def _read(self, key: str) -> bytes:
        note = self._board.wait(key, self._job.timeout_secs)
        if note is None:
            raise RankFailedError(f"a rank did not post {key} within {self._job.timeout_secs:g} s", ())
        return note


def newest_whole(directory: str, damaged: Collection[int]) -> CheckpointInfo | None:
    """The newest checkpoint whose files are there, with their sizes; None: there is none.

    Args:
        damaged: steps known to be.
    """
    steps = (step for step in committed_steps(directory) if step not in damaged)
    return next((info for step in steps if (info := _if_whole(directory, step)) is not None), None)


def _if_whole(directory: str, step: int) -> CheckpointInfo | None:
    path = os.path.join(directory, checkpoint_name(step))
    with suppress(CorruptCheckpointError, StorageError):
        info, manifest = read_checkpoint(directory, step)
        if not extra_files(path, manifest) and not check_files(path, manifest, full=False):
            return info
    return None


def _by_save(offered: Iterable[_Offered]) -> dict[str, dict[int, _Offered]]:
    """Of each save, the shares by owner."""
    saves: dict[str, dict[int, _Offered]] = {}
    for one in offered:
        saves.setdefault(one.save_id, {})[one.owner] = one
    return saves


def _first(save: dict[int, _Offered]) -> _Offered:
    """Of the first rank: its clock is the one that checkpoints are dated by."""
    return save[min(save)]
