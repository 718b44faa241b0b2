"""One later save of all ranks: ``persist.py`` and ``commit.py`` in simulated time.

The training threads are not here: they send no request and make no call. Nor is staging, nor what the workers do with the
bytes, which is ``write_secs``, and no other rank's business.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from stager.workers.checkpoint.commit.commit import num_threads
from tests.benchmarks.scale.ending import Ending
from tests.benchmarks.scale.filesystem import Call
from tests.benchmarks.scale.simulation import Actor, Steps, in_threads
from tests.benchmarks.scale.world import World


class Save:
    """
    Args:
        starts: when each part of each rank begins, seconds.

    Attributes:
        ending: how it ends on each rank.
        first_at: when the first rank had written and synced all of its parts.
        written_at: when the last byte of the last rank was written, before it was synced.
        committer: the process that committed.
        commit_secs: from its seeing all receipts to the rename being durable.
    """

    def __init__(self, world: World, starts: Sequence[Sequence[float]]) -> None:
        self.ending = Ending(world)
        self.first_at = math.inf
        self.written_at = 0.0
        self.committer: Actor | None = None
        self.commit_secs = 0.0
        self._world = world
        self._num_parts = len(starts[0])
        self._left = [self._num_parts] * world.num_ranks
        self._has_committed = [False] * world.num_ranks
        for rank, of_rank in enumerate(starts):
            for part, start in enumerate(of_rank):
                world.simulation.start(self._part(rank, part, Actor(start)), start)

    @property
    def _num_files(self) -> int:
        """Records and receipts, which the commit reads and removes."""
        return self._world.num_ranks * (1 + self._num_parts)

    # -- a part ---------------------------------------------------------------------------------------------------

    def _part(self, rank: int, part: int, actor: Actor) -> Steps[None]:
        files, directory, parameters = self._world.files, self._world.directory, self._world.parameters
        yield from files.call(actor, Call.CREATE)  # the partial directory, if it is not there
        yield from files.call(actor, Call.OPEN)
        yield from directory.share(actor)
        yield from files.call(actor, Call.OPEN)  # is it committed?
        yield from files.call(actor, Call.ATTRIBUTES)  # is it still the same?
        yield from files.call(actor, Call.ATTRIBUTES)  # is it withdrawn?
        yield from files.call(actor, Call.OPEN)  # is there a receipt?
        if part == 0:
            yield from files.write_atomically(actor, directory, self._world.costs.record_bytes)
        is_last = part == self._num_parts - 1
        num_files = 2 if is_last and parameters.objects else 1  # the objects have a file of their own
        for _ in range(num_files):
            yield from files.call(actor, Call.CREATE)
            directory.num_names += 1
            yield from files.call(actor, Call.ATTRIBUTES)  # its length
        actor.now += parameters.write_secs
        self.written_at = max(self.written_at, actor.now)
        for _ in range(num_files + 1):  # and the directory
            files.sync(actor)
        yield from files.write_atomically(actor, directory, self._world.costs.receipt_bytes)
        directory.num_receipts += 1
        yield from directory.release(actor)
        if (yield from self._try_commit(actor)):
            self._has_committed[rank] = True
        yield actor.now
        self._left[rank] -= 1
        if not self._left[rank]:
            trainer = Actor(actor.now)
            self.first_at = min(self.first_at, trainer.now)
            finish = self.ending.tell if self._has_committed[rank] else self.ending.watch
            self._world.simulation.start(finish(rank, trainer), trainer.now)

    # -- the commit -----------------------------------------------------------------------------------------------

    def _try_commit(self, actor: Actor) -> Steps[bool]:
        """Whether this save is committed, by this process or, just now, by another."""
        files, directory = self._world.files, self._world.directory
        yield from files.call(actor, Call.OPEN)
        if directory.is_committed():
            return (yield from self.ending.look(actor))
        if not (yield from directory.take(actor)):
            return False
        yield from files.call(actor, Call.ATTRIBUTES)  # is it still the same?
        if directory.is_committed():
            yield from self.ending.look(actor)
        else:
            yield from files.call(actor, Call.OPEN)  # is there a manifest?
            yield from files.list(actor, directory)
            if directory.has_every_receipt():
                started = actor.now
                yield from self._commit(actor)
                self.committer, self.commit_secs = actor, actor.now - started
        yield from directory.release(actor)
        return directory.is_committed()

    def _commit(self, actor: Actor) -> Steps[None]:
        files, directory, costs = self._world.files, self._world.directory, self._world.costs
        threads = num_threads(self._world.num_ranks)
        readers = [partial(self._read_share, is_own=not rank) for rank in range(self._world.num_ranks)]
        yield from in_threads(self._world.simulation, actor, readers, threads)
        actor.now += costs.commit_secs
        yield from files.write_atomically(actor, directory, costs.metadata_bytes)
        yield from files.write_atomically(actor, directory, costs.manifest_bytes)
        yield from files.list(actor, directory)
        removers = [self._remove] * self._num_files
        yield from in_threads(self._world.simulation, actor, removers, threads)
        files.sync(actor)
        yield from files.call(actor, Call.OPEN)  # is there an older one?
        yield from files.call(actor, Call.RENAME)
        directory.commit()
        yield from files.call(actor, Call.OPEN)  # the run's directory
        files.sync(actor)

    def _read_share(self, actor: Actor, *, is_own: bool) -> Steps[None]:
        costs = self._world.costs
        if not is_own:  # its own record is in memory
            yield from self._read(actor, costs.record_bytes)
        for _ in range(self._num_parts):
            yield from self._read(actor, costs.receipt_bytes)

    def _read(self, actor: Actor, nbytes: float) -> Steps[None]:
        yield from self._world.files.call(actor, Call.OPEN)
        yield from self._world.files.read(actor, nbytes)

    def _remove(self, actor: Actor) -> Steps[None]:
        yield from self._world.files.call(actor, Call.ATTRIBUTES)
        yield from self._world.files.call(actor, Call.UNLINK)
        self._world.directory.num_names -= 1
