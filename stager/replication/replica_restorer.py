"""When a run begins, or finds its newest checkpoint damaged: a save that is in the partners' memory, and not on the disk,
becomes a checkpoint.

1. Each rank posts which memory it sees. The first rank of each memory offers the replicas there. All come to a barrier.
2. Rank 0 chooses the newest save that is newer than the disk, and of which every rank's part is either offered or already
   in the save's partial directory. It broadcasts what each memory's ranks are to write. Nothing to choose: the end.
3. These ranks' workers check the replicas, and write the missing parts as their owners would have. The last one commits.
4. All come to a barrier. Rank 0 looks whether the checkpoint is whole, and broadcasts that.
5. Whole: the end. A file system failed: every rank raises. A replica failed: again from step 2, without this choice.

The result is a checkpoint like any other: durable, verified, loaded by any number of ranks.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import time
from collections.abc import Collection
from contextlib import suppress
from functools import partial

from stager.ranks import keys
from stager.ranks.messages import (
    MemoryPlace,
    NewestStep,
    OfferedReplica,
    ReplicaOffer,
    RestoreChoice,
    RestoreEnd,
    RestoreFailed,
    RestorePlan,
)
from stager.ranks.rank_group import RankGroup, some_ranks
from stager.replication.candidates import Candidates, if_whole, newest_whole
from stager.replication.exchange import partners
from stager.replication.replicas import Replicas
from stager.workers.checkpoint.commit.persist import discard_partial
from stager.workers.checkpoint.commit.replica import check_replica, persist_replica
from stager.workers.checkpoint.documents.manifest import MANIFEST_NAME
from stager.workers.checkpoint.maintenance.recover import recover
from stager.workers.errors import ReplicationError, StagerError, StorageError
from stager.workers.memory.descriptor import Descriptor
from stager.workers.pool.pool import WorkerPool

logger = logging.getLogger("stager")

_POLL_SECS = 0.02
_VISIBLE_SECS = 60.0  # for so long NFS may keep a directory's attributes


class ReplicaRestorer:
    """Restores checkpoints from replicas. A group of one restores what several ranks left on its host, too.

    Every rank of the group calls the same methods. The workers of ``pool`` write.
    """

    def __init__(
        self, group: RankGroup, directory: str, replicas: Replicas, pool: WorkerPool, lock: Descriptor
    ) -> None:
        self._group = group
        self._directory = directory
        self._replicas = replicas
        self._pool = pool
        self._lock = lock
        self._num_restores = 0

    def open(self) -> str:
        """Restore what can be restored when the run begins, then tidy the directory up. Every rank calls it.

        Returns:
            The id of the newest save that is whole in memory; "": there is none.

        Raises:
            RankFailedError: a rank did not come.
            StorageError: the newest save is whole in memory, and the file system does not take it.
        """
        whole_id, _ = self._restore(())

        def tidy_up() -> NewestStep:
            # Only after the restore: until then, parts that the last run left may complete a checkpoint.
            for found in recover(self._directory):
                logger.warning("%s", found)
            newest = newest_whole(self._directory, ())
            return NewestStep(-1 if newest is None else newest.step)

        task = f"tidy up {self._directory}"
        newest = self._group.broadcast(keys.REPLICAS_NEWEST, NewestStep, tidy_up, task)
        self._group.barrier(keys.REPLICAS_OPENED, task)
        self._remove_strangers(whole_id, newest.step)
        return whole_id

    def restore(self, damaged: int) -> bool:
        """Restore the checkpoint of a damaged step, or a newer one. Returns whether that was done. Every rank calls it.

        Raises:
            RankFailedError, StorageError: see :meth:`open`.
        """
        return self._restore((damaged,))[1]

    def _restore(self, damaged: Collection[int]) -> tuple[str, bool]:
        """Restore, by the steps above. Returns the id of the newest save that is whole in memory, and whether it did."""
        group = self._group
        self._num_restores += 1
        key = keys.restore(self._num_restores)
        # 1. The offers come before the barrier, so the list is complete after it.
        place, number = self._offer(key)
        group.barrier(key, "looking for replicas")
        offers = group.gather(f"{key}/offers", ReplicaOffer) if group.is_coordinator else []
        candidates = Candidates(self._directory, [one for offer in offers for one in offer.replicas], damaged)
        num_here = group.count(f"{key}/places/{place}", 0)
        tried: list[RestorePlan] = []

        def choose() -> RestoreChoice:
            plan = None
            try:
                plan = candidates.pick(tried)
            except StagerError as error:
                logger.warning("nothing is restored from memory: %s", error)
            return RestoreChoice(plan, candidates.newest_in_memory())

        while True:
            at = f"{key}/{len(tried)}"
            # 2. Rank 0 chooses; the others read its choice.
            choice = group.broadcast(f"{at}/choice", RestoreChoice, choose, "choose what to restore from memory")
            plan = choice.plan
            if plan is None:
                return choice.whole_id, False
            # 3. The ranks of one memory divide the work.
            try:
                self._write(plan, plan.owners.get(place, ())[number::num_here])
            except StagerError as error:
                self._post_failure(at, plan.step, error)
            # 4. A failure is posted before its rank comes, so every rank reads the same one after the barrier.
            group.barrier(f"{at}/written", f"restoring step {plan.step} from memory")
            failed = group.first(f"{at}/failed", RestoreFailed)
            # 5. Rank 0 looks, all hear of it; without a checkpoint, the next choice.
            if self._ended(at, plan, failed):
                return choice.whole_id, True
            tried.append(plan)

    def _post_failure(self, at: str, step: int, error: StagerError) -> None:
        logger.warning("step %d is not restored from memory: %s", step, error)
        failure = RestoreFailed(0, "", "")
        if isinstance(error, StorageError):
            failure = RestoreFailed(error.errno or errno.EIO, error.message, error.path)
        self._group.post_first(f"{at}/failed", failure)

    def _ended(self, at: str, plan: RestorePlan, failed: RestoreFailed | None) -> bool:
        """Whether the checkpoint is whole now, as rank 0 sees it.

        Raises:
            StorageError: a file system did not take it.
        """
        task = f"look whether step {plan.step} was restored from memory"
        check = partial(self._check, plan, has_failed=failed is not None)
        end = self._group.broadcast(f"{at}/end", RestoreEnd, lambda: RestoreEnd(check()), task)
        if end.is_done or failed is None or not failed.errno:
            return end.is_done
        raise StorageError(  # to go on from an older step would lose what is in memory
            failed.errno,
            f"step {plan.step} is in the partners' memory, and could not be written: {failed.message}. Mend that and start "
            f"again; or remove {self._replicas.path} on every host to go on from an older step",
            failed.path,
        )

    def _check(self, plan: RestorePlan, *, has_failed: bool) -> bool:
        """Look on rank 0 whether the checkpoint is there and whole. If it is not, remove a partial directory that is left.

        Only a directory of a new id is removed: no other process writes there. The save's own may be completed otherwise.

        Args:
            has_failed: a rank could not write its parts, so do not wait for the checkpoint to become visible.
        """
        manifest = os.path.join(self._directory, plan.name, MANIFEST_NAME)
        # A network file system may show it to this host later.
        deadline = time.monotonic() + (0.0 if has_failed else min(_VISIBLE_SECS, self._group.timeout_secs / 2))
        while not os.path.lexists(manifest) and time.monotonic() < deadline:
            time.sleep(_POLL_SECS)
        found = if_whole(self._directory, plan.step)
        if found is not None and found.save_id == plan.written_as:
            told = "%s was not whole on the disk; the parts of %d ranks were written from their partners' memory"
            logger.warning(told, plan.name, sum(map(len, plan.owners.values())))
            return True
        if plan.written_as != plan.save_id:
            with suppress(StorageError):
                discard_partial(self._directory, plan.name, plan.written_as)
        return False

    def _offer(self, key: str) -> tuple[str, int]:
        """Offer what is in this host's memory. Returns which memory that is, and this rank's number among its ranks."""
        found = os.stat(self._replicas.path)
        place = f"{_boot_id()}/{found.st_dev}/{found.st_ino}"
        self._group.post(f"{key}/place/{self._group.rank}", MemoryPlace(place))
        number = self._group.count(f"{key}/places/{place}") - 1
        if number == 0:
            rows = [
                OfferedReplica(
                    place, replica.owner, spec.step, spec.save_id, spec.num_ranks, spec.created, spec.final_name
                )
                for replica in self._replicas.whole()
                for spec in (replica.header.spec,)
            ]
            self._group.contribute(f"{key}/offers", ReplicaOffer(tuple(rows)))
        return place, number

    def _write(self, plan: RestorePlan, owners: Collection[int]) -> None:
        """Write the parts of these owners from this host's replicas.

        Raises:
            StagerError
        """
        if not owners:
            return
        found = {one.owner: one for one in self._replicas.whole() if one.header.spec.save_id == plan.save_id}
        if lost := [owner for owner in owners if owner not in found]:
            raise ReplicationError(f"the replicas of rank {some_ranks(lost)} are not there any more")
        replicas = [found[owner] for owner in owners]
        # All are checked before any is written: a part that is written is not written again.
        for checked in [self._pool.submit(check_replica, replica.path) for replica in replicas]:
            checked.result()
        parts = [
            self._pool.submit(persist_replica, replica.path, part, self._directory, plan.written_as, self._lock)
            for replica in replicas
            for part in range(replica.header.spec.num_parts)
        ]
        # All have ended before one is raised: rank 0 may then remove what they have written.
        if errors := [error for part in parts if (error := part.exception()) is not None]:
            raise errors[0]

    def _remove_strangers(self, whole_id: str, newest: int) -> None:
        """Remove the replicas of ranks that no rank of this host keeps any more: there are fewer ranks, or they moved.

        Args:
            whole_id: of the newest save that is whole in memory, which stays if the disk does not have it.
            newest: step of the newest checkpoint on the disk.
        """
        place_of, num_ranks = f"{keys.restore(self._num_restores)}/place", self._group.num_ranks
        here = self._group.read(f"{place_of}/{self._group.rank}")
        for path, owner in self._replicas.files():
            if owner < num_ranks > 1:
                keeper, _ = partners(owner, num_ranks)
                if self._group.read(f"{place_of}/{keeper}") == here:
                    continue
            header = self._replicas.read(path)
            if header is None or header.spec.save_id != whole_id or header.spec.step <= newest:
                self._replicas.remove(path)


def _boot_id() -> str:
    """Of this host, since it was started: names need not be unique."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return socket.gethostname()
