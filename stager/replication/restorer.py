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
import socket
import time
from collections.abc import Collection
from concurrent.futures import Future
from contextlib import suppress

from stager.ranks.rank_group import RankGroup, some_ranks
from stager.replication.candidates import Candidates, Offered, Plan, if_whole, newest_whole
from stager.replication.partners import partners
from stager.replication.replicas import Replica, Replicas
from stager.workers.checkpoint.commit.persist import PartResult, discard_partial
from stager.workers.checkpoint.commit.replica import check_replica, persist_replica
from stager.workers.checkpoint.directory.manifest import MANIFEST_NAME
from stager.workers.checkpoint.directory.run_directory import checkpoint_name
from stager.workers.checkpoint.maintenance.recover import recover
from stager.workers.errors import RankFailedError, ReplicationError, StagerError, StorageError
from stager.workers.pool.pool import WorkerPool

logger = logging.getLogger("stager")

_POLL_SECS = 0.02
_VISIBLE_SECS = 60.0  # for so long NFS may keep a directory's attributes


class Restorer:
    """
    Args:
        group: with a rendezvous.
        directory: of the run, absolute.
        replicas: of this host.
        pool: whose workers write.
    """

    def __init__(self, group: RankGroup, directory: str, replicas: Replicas, pool: WorkerPool) -> None:
        assert group.rendezvous is not None
        self._group = group
        self._rendezvous = group.rendezvous
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
            StorageError: the newest save is whole in memory, and the file system does not take it.
        """
        whole_id, _ = self._restore(frozenset())
        if self._group.is_coordinator:
            for found in recover(self._directory):
                logger.warning("%s left by an earlier run: %s (%s)", found.name, found.outcome.value, found.reason)
            newest = newest_whole(self._directory, ())
            self._rendezvous.post("replicas/newest", str(-1 if newest is None else newest.step).encode())
        self._group.barrier("replicas/opened", f"tidying up {self._directory}")
        self._remove_strangers(whole_id, int(self._read("replicas/newest")))
        return whole_id

    def restore(self, damaged: int) -> bool:
        """The checkpoint of this step is damaged: restore it, or a newer one. Every rank calls it. Whether that was done.

        Raises:
            RankFailedError, StorageError: see :meth:`open`.
        """
        return self._restore(frozenset((damaged,)))[1]

    def _restore(self, damaged: Collection[int]) -> tuple[str, bool]:
        self._times += 1
        head = meeting(self._times)
        place, number = self._offer(head)
        self._group.barrier(head, "looking for replicas")
        candidates = Candidates(self._directory, self._read_offers(head) if self._group.is_coordinator else [], damaged)
        tried: list[Plan] = []
        while True:
            at = f"{head}/{len(tried)}"
            plan = self._agree_on(at, candidates, tried)
            if plan is None:
                return self._whole_id(head, candidates), False
            try:
                self._write(plan, self._mine(head, place, number, plan))
            except StagerError as error:
                self._post_failure(at, plan, error)
            self._group.barrier(f"{at}/written", f"restoring step {plan.step} from memory")
            if self._is_done(at, plan):
                return self._whole_id(head, candidates), True
            tried.append(plan)

    def _post_failure(self, at: str, plan: Plan, error: StagerError) -> None:
        logger.warning("step %d is not restored from memory: %s", plan.step, error)
        if self._rendezvous.add(f"{at}/failures") == 1:
            of_disk = [error.errno, error.message, error.path] if isinstance(error, StorageError) else None
            self._rendezvous.post(f"{at}/failure", json.dumps(of_disk).encode())

    def _is_done(self, at: str, plan: Plan) -> bool:
        """Every rank is told the same.

        Raises:
            StorageError: a file system did not take it.
        """
        has_failed = self._rendezvous.add(f"{at}/failures", 0) > 0
        if self._group.is_coordinator:
            is_done = self._await(plan, 0.0 if has_failed else min(_VISIBLE_SECS, self._group.timeout_secs / 2))
            self._rendezvous.post(f"{at}/result", b"done" if is_done else b"failed")
            if is_done:
                logger.warning(
                    "%s was not whole on the disk; shares of %d ranks were written from their partners' memory",
                    checkpoint_name(plan.step),
                    sum(map(len, plan.owners.values())),
                )
            elif plan.written_as != plan.save_id:  # nobody else knows of it
                with suppress(StorageError):
                    discard_partial(self._directory, plan.step, plan.written_as)
        if self._read(f"{at}/result") == b"done":
            return True
        of_disk = json.loads(self._read(f"{at}/failure")) if has_failed else None
        if of_disk is not None:  # to go on from an older step would lose what is there
            code, message, path = of_disk
            raise StorageError(
                code,
                f"step {plan.step} is in the partners' memory, and could not be written: {message}. Mend that and start "
                f"again; or remove {self._replicas.path} on every host to go on from an older step",
                path,
            )
        return False

    def _await(self, plan: Plan, secs: float) -> bool:
        """Whether the checkpoint is there, and whole. A network file system may show it to this host a little later."""
        manifest = os.path.join(self._directory, checkpoint_name(plan.step), MANIFEST_NAME)
        deadline = time.monotonic() + secs
        while not os.path.lexists(manifest) and time.monotonic() < deadline:
            time.sleep(_POLL_SECS)
        found = if_whole(self._directory, plan.step)
        return found is not None and found.save_id == plan.written_as

    # -- what there is ------------------------------------------------------------------------------------------

    def _offer(self, head: str) -> tuple[str, int]:
        """Which memory this is, and this rank's number among those that see the same; number 0 offers what is in it."""
        found = os.stat(self._replicas.path)
        place = f"{_boot_id()}/{found.st_dev}/{found.st_ino}"
        self._rendezvous.post(f"{head}/place/{self._group.rank}", place.encode())
        number = self._rendezvous.add(f"{head}/places/{place}") - 1
        if number == 0:
            offer = self._rendezvous.add(f"{head}/offers")
            rows = [
                [replica.owner, spec.step, spec.save_id, spec.num_ranks, spec.created]
                for replica in self._replicas.whole()
                for spec in (replica.header.spec,)
            ]
            self._rendezvous.post(f"{head}/offer/{offer}", json.dumps(rows).encode())
            self._rendezvous.post(f"{head}/offer-of/{place}", str(offer).encode())
        return place, number

    def _mine(self, head: str, place: str, number: int, plan: Plan) -> list[Replica]:
        """What this rank writes of what the plan wants of its host: the ranks there share the work."""
        owners = plan.owners.get(int(self._read(f"{head}/offer-of/{place}")), [])
        mine = owners[number :: self._rendezvous.add(f"{head}/places/{place}", 0)]
        if not mine:
            return []
        found = {r.owner: r for r in self._replicas.whole() if r.header.spec.save_id == plan.save_id}
        lost = [owner for owner in mine if owner not in found]
        if lost:
            raise ReplicationError(f"the replicas of rank {some_ranks(lost)} are not there any more")
        return [found[owner] for owner in mine]

    def _read_offers(self, head: str) -> list[Offered]:
        return [
            Offered(number, *row)
            for number in range(1, self._rendezvous.add(f"{head}/offers", 0) + 1)
            for row in json.loads(self._read(f"{head}/offer/{number}"))
        ]

    def _whole_id(self, head: str, candidates: Candidates) -> str:
        """Of the newest save that is in memory entirely, so that it is not overwritten before another one is."""
        if self._group.is_coordinator:
            self._rendezvous.post(f"{head}/whole", candidates.newest_in_memory().encode())
        return self._read(f"{head}/whole").decode()

    # -- what to do ---------------------------------------------------------------------------------------------

    def _agree_on(self, at: str, candidates: Candidates, tried: Collection[Plan]) -> Plan | None:
        if self._group.is_coordinator:
            try:
                plan = candidates.pick(tried)
            except StagerError as error:
                logger.warning("nothing is restored from memory: %s", error)
                plan = None
            note = None if plan is None else [plan.step, plan.save_id, plan.written_as, list(plan.owners.items())]
            self._rendezvous.post(f"{at}/plan", json.dumps(note).encode())
            return plan
        note = json.loads(self._read(f"{at}/plan"))
        return None if note is None else Plan(note[0], note[1], note[2], dict(note[3]))

    def _write(self, plan: Plan, replicas: Collection[Replica]) -> None:
        """The shares that this host has.

        Raises:
            StagerError
        """
        for future in [self._pool.submit(check_replica, replica.path) for replica in replicas]:
            future.result()
        parts: list[Future[PartResult]] = [
            self._pool.submit(persist_replica, replica.path, part, self._directory, plan.written_as)
            for replica in replicas
            for part in range(replica.header.spec.num_parts)
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
        head = meeting(self._times)
        here = self._rendezvous.read(f"{head}/place/{self._group.rank}")
        for path, owner in self._replicas.files():
            num_ranks = self._group.num_ranks
            keeper = partners(owner, num_ranks)[0] if owner < num_ranks > 1 else None
            if keeper is None or self._rendezvous.read(f"{head}/place/{keeper}") != here:
                header = self._replicas.read(path)
                if header is None or header.spec.save_id != whole_id or header.spec.step <= newest:
                    self._replicas.remove(path)

    def _read(self, key: str) -> bytes:
        note = self._rendezvous.wait(key, self._group.timeout_secs)
        if note is None:
            raise RankFailedError(f"a rank did not post {key} within {self._group.timeout_secs:g} s", ())
        return note


def meeting(number: int) -> str:
    """Where the ranks meet for the first time of a restoration; the first one is numbered 1."""
    return f"replicas/restore/{number}"


def _boot_id() -> str:
    """Of this host, since it was started: names need not be unique."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return socket.gethostname()
