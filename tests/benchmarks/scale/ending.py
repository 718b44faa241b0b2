"""How a save ends on every rank: ``commit_watch.py`` in simulated time, for a save that nothing goes wrong with."""

from __future__ import annotations

import math

from stager.ranks import keys
from stager.ranks.commit_watch import _FIRST_POLL_SECS, _NUM_TELLING
from stager.ranks.messages import EveryPartWritten, NewestStep, SaveCommitted, SaveFailed, encode
from stager.ranks.rank_group import RankGroup
from stager.workers import long_wait
from stager.workers.checkpoint.commit.commit import Committed
from stager.workers.checkpoint.directory.run_directory import CheckpointInfo
from tests.benchmarks.scale.filesystem import Call
from tests.benchmarks.scale.simulation import Actor, Steps
from tests.benchmarks.scale.store import SimulatedGroup
from tests.benchmarks.scale.world import World

_INFO = CheckpointInfo(
    1000, "/checkpoints/run/step-00001000", 1 << 40, 1764300000.25, "0123456789abcdef", 99999, 999, "dcp"
)
COMMITTED = Committed(_INFO, 1764300000.25, 1764300000.75, 12345)
_FAILED = SaveFailed("", ())  # how it fails is not simulated
_END = keys.save_end(_INFO.save_id)
_EVERY_PART = keys.every_part(_INFO.save_id)


class Ending:
    """Attributes:
    ended_at: when each rank knew that the save is committed, seconds; None: not in time.
    trainers: of each rank, the thread that waited for it.
    """

    def __init__(self, world: World) -> None:
        self.ended_at: dict[int, float | None] = {}
        self.trainers: dict[int, Actor] = {}
        self._world = world

    def tell(self, rank: int, actor: Actor) -> Steps[None]:
        """By the rank whose worker committed."""
        self.trainers[rank] = actor
        yield from self._post(self._group(actor))
        self.ended_at[rank] = actor.now

    def watch(self, rank: int, actor: Actor) -> Steps[None]:
        """By a rank whose parts are written. See NOTE [ Who looks at the directory ] in ``commit_watch.py``."""
        self.trainers[rank] = actor
        self.ended_at[rank] = None
        group, timeout_secs = self._group(actor), self._world.parameters.timeout_secs
        deadline = actor.now + timeout_secs
        looks_at = actor.now + (1 + rank) * RankGroup.look_secs
        tells_at = actor.now + long_wait.ADVICE_SECS if rank < _NUM_TELLING else math.inf
        has_every_part = False
        poll = _FIRST_POLL_SECS
        while True:
            if (note := (yield from group.read(_END))) is not None:
                self.ended_at[rank] = None if note == encode(_FAILED) else actor.now
                return
            now = actor.now
            if now >= tells_at:  # who has not begun the save
                tells_at = math.inf
                yield from self._world.files.list(actor, self._world.directory)
            is_late = now >= deadline + rank.bit_length() * RankGroup.turn_secs
            if is_late and not has_every_part and (yield from group.read(_EVERY_PART)) is not None:
                has_every_part = True
                deadline += timeout_secs
            elif is_late or now >= looks_at:
                if (yield from self.look(actor)):
                    yield from self._post_found(group)
                    self.ended_at[rank] = actor.now
                    return
                looks_at = now + (self._world.num_ranks if rank else 1) * RankGroup.look_secs
                if is_late:
                    if has_every_part or not (yield from self._is_written(actor)):
                        yield from group.post(_END, _FAILED)
                        return
                    has_every_part = True
                    deadline += timeout_secs
                    yield from group.post(_EVERY_PART, EveryPartWritten())
                else:
                    yield from self._help(rank, actor, group)
            actor.now += poll
            poll = min(self._world.end_poll_secs, poll * 1.5)

    def _post(self, group: SimulatedGroup) -> Steps[None]:
        yield from group.post(_END, SaveCommitted(COMMITTED))
        yield from group.post(keys.NEWEST, NewestStep(_INFO.step))

    def _post_found(self, group: SimulatedGroup) -> Steps[None]:
        if (yield from group.read(_END)) is None:
            yield from self._post(group)

    def look(self, actor: Actor) -> Steps[bool]:
        """Whether the checkpoint is there: ``stager.workers.checkpoint.commit.commit.already_committed``."""
        yield from self._world.files.call(actor, Call.OPEN)
        if not self._world.directory.is_committed():
            return False
        yield from self._world.files.read(actor, self._world.costs.manifest_bytes)
        actor.now += self._world.costs.parse_secs
        return True

    def _is_written(self, actor: Actor) -> Steps[bool]:
        """Whether the save only has to be committed, which is worth as long again."""
        yield from self._world.files.list(actor, self._world.directory)
        return self._world.directory.has_every_receipt()

    def _help(self, rank: int, actor: Actor, group: SimulatedGroup) -> Steps[None]:
        """Were there all receipts and no commit, it would commit. (That somebody else does, its worker sees by the lock:
        these calls are left out.)"""
        if not self._world.directory.is_committed():
            if (yield from self._is_written(actor)) and rank:
                yield from group.count(keys.commit_helpers(_INFO.save_id))

    def _group(self, actor: Actor) -> SimulatedGroup:
        return SimulatedGroup(self._world.store, actor, self._world.wait_poll_secs)
