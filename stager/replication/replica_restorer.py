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
from collections.abc import Collection, Sequence
from contextlib import suppress

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
from stager.replication.replicas import Replica, Replicas
from stager.workers.checkpoint.commit.persist import discard_partial
from stager.workers.checkpoint.commit.replica import check_replica, persist_replica
from stager.workers.checkpoint.directory.manifest import MANIFEST_NAME
from stager.workers.checkpoint.directory.run_directory import checkpoint_name
from stager.workers.checkpoint.maintenance.recover import recover
from stager.workers.errors import ReplicationError, StagerError, StorageError
from stager.workers.pool.pool import WorkerPool

logger = logging.getLogger("stager")

_POLL_SECS = 0.02
_VISIBLE_SECS = 60.0  # for so long NFS may keep a directory's attributes


class ReplicaRestorer:
    """Restores checkpoints from replicas. A group of one restores what several ranks left on its host, too.

    Args:
        group: every rank of it calls the same methods.
        directory: of the run, absolute.
        replicas: of this host.
        pool: whose workers write.
    """

    def __init__(self, group: RankGroup, directory: str, replicas: Replicas, pool: WorkerPool) -> None:
        self._group = group
        self._directory = directory
        self._replicas = replicas
        self._pool = pool
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
            for found in recover(self._directory):
                logger.warning("%s left by an earlier run: %s (%s)", found.name, found.outcome.value, found.reason)
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
        place, number = self._offer(key)
        group.barrier(key, "looking for replicas")
        offers = group.gather(f"{key}/offers", ReplicaOffer) if group.is_coordinator else []
        candidates = Candidates(self._directory, [one for offer in offers for one in offer.replicas], damaged)
        tried: list[RestorePlan] = []
        while True:
            at = f"{key}/{len(tried)}"
            choice = group.broadcast(
                f"{at}/choice",
                RestoreChoice,
                lambda: RestoreChoice(self._choose(candidates, tried), candidates.newest_in_memory()),
                "choose what to restore from memory",
            )
            plan = choice.plan
            if plan is None:
                return choice.whole_id, False
            try:
                self._write(
                    plan, self._own_part(f"{key}/places/{place}", plan.owners.get(place, ()), number, plan.save_id)
                )
            except StagerError as error:
                self._post_failure(at, plan.step, error)
            group.barrier(f"{at}/written", f"restoring step {plan.step} from memory")
            failed = group.first(f"{at}/failed", RestoreFailed)
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
        end = self._group.broadcast(
            f"{at}/end",
            RestoreEnd,
            lambda: RestoreEnd(self._check(plan, has_failed=failed is not None)),
            f"look whether step {plan.step} was restored from memory",
        )
        if end.is_done or failed is None or not failed.errno:
            return end.is_done
        raise StorageError(  # to go on from an older step would lose what is in memory
            failed.errno,
            f"step {plan.step} is in the partners' memory, and could not be written: {failed.message}. Mend that and start "
            f"again; or remove {self._replicas.path} on every host to go on from an older step",
            failed.path,
        )

    def _check(self, plan: RestorePlan, *, has_failed: bool) -> bool:
        """On rank 0: whether the checkpoint is there and whole. If it is not, remove what nobody else knows of."""
        name = checkpoint_name(plan.step)
        manifest = os.path.join(self._directory, name, MANIFEST_NAME)
        # A network file system may show it to this host later.
        deadline = time.monotonic() + (0.0 if has_failed else min(_VISIBLE_SECS, self._group.timeout_secs / 2))
        while not os.path.lexists(manifest) and time.monotonic() < deadline:
            time.sleep(_POLL_SECS)
        found = if_whole(self._directory, plan.step)
        if found is not None and found.save_id == plan.written_as:
            num_parts = sum(map(len, plan.owners.values()))
            logger.warning(
                "%s was not whole on the disk; the parts of %d ranks were written from their partners' memory",
                name,
                num_parts,
            )
            return True
        if plan.written_as != plan.save_id:
            with suppress(StorageError):
                discard_partial(self._directory, plan.step, plan.written_as)
        return False

    # -- what there is ------------------------------------------------------------------------------------------

    def _offer(self, key: str) -> tuple[str, int]:
        """Offer what is in this host's memory. Returns which memory that is, and this rank's number among its ranks."""
        found = os.stat(self._replicas.path)
        place = f"{_boot_id()}/{found.st_dev}/{found.st_ino}"
        self._group.post(f"{key}/place/{self._group.rank}", MemoryPlace(place))
        number = self._group.count(f"{key}/places/{place}") - 1
        if number == 0:
            rows = [
                OfferedReplica(place, replica.owner, spec.step, spec.save_id, spec.num_ranks, spec.created)
                for replica in self._replicas.whole()
                for spec in (replica.header.spec,)
            ]
            self._group.contribute(f"{key}/offers", ReplicaOffer(tuple(rows)))
        return place, number

    def _own_part(self, ranks_key: str, owners: Sequence[int], number: int, save_id: str) -> list[Replica]:
        """The replicas that this rank writes: the ranks of one memory divide the work.

        Args:
            ranks_key: counts the ranks that see this memory.
            owners: whose replicas are to be written from there.
            number: of this rank among them.
        """
        own = owners[number :: self._group.count(ranks_key, 0)]
        if not own:
            return []
        found = {r.owner: r for r in self._replicas.whole() if r.header.spec.save_id == save_id}
        lost = [owner for owner in own if owner not in found]
        if lost:
            raise ReplicationError(f"the replicas of rank {some_ranks(lost)} are not there any more")
        return [found[owner] for owner in own]

    # -- what to do ---------------------------------------------------------------------------------------------

    def _choose(self, candidates: Candidates, tried: Collection[RestorePlan]) -> RestorePlan | None:
        try:
            return candidates.pick(tried)
        except StagerError as error:
            logger.warning("nothing is restored from memory: %s", error)
            return None

    def _write(self, plan: RestorePlan, replicas: Collection[Replica]) -> None:
        """Write the parts of these replicas' owners.

        Raises:
            StagerError
        """
        # All are checked before any is written: a part that is written is not written again.
        for checked in [self._pool.submit(check_replica, replica.path) for replica in replicas]:
            checked.result()
        parts = [
            self._pool.submit(persist_replica, replica.path, part, self._directory, plan.written_as)
            for replica in replicas
            for part in range(replica.header.spec.num_parts)
        ]
        errors = [error for part in parts if (error := part.exception()) is not None]
        if errors:
            raise errors[0]

    def _remove_strangers(self, whole_id: str, newest: int) -> None:
        """Remove the replicas of ranks that no rank of this host keeps any more: there are fewer ranks, or they moved.

        Args:
            whole_id: of the newest save that is whole in memory, which stays if the disk does not have it.
            newest: step of the newest checkpoint on the disk.
        """
        key, num_ranks = keys.restore(self._num_restores), self._group.num_ranks
        here = self._group.read(f"{key}/place/{self._group.rank}")
        for path, owner in self._replicas.files():
            is_kept_here = owner < num_ranks > 1 and (
                self._group.read(f"{key}/place/{partners(owner, num_ranks)[0]}") == here
            )
            if not is_kept_here:
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
