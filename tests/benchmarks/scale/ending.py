"""How a save ends on every rank: ``stager/ranks/outcome.py`` in simulated time, for a save that nothing goes wrong with."""

from __future__ import annotations

import json
from dataclasses import asdict

from stager.ranks.outcome import _FIRST_POLL_SECS
from tests.benchmarks.scale.filesystem import Call
from tests.benchmarks.scale.simulation import Actor, Steps
from tests.benchmarks.scale.store import Board
from tests.benchmarks.scale.world import World
from workers.commit import Committed
from workers.directory import CheckpointInfo

_INFO = CheckpointInfo(
    1000, "/checkpoints/run/step-00001000", 1 << 40, 1764300000.25, "0123456789abcdef", 99999, 999, "dcp"
)
COMMITTED = Committed(_INFO, 1764300000.25, 1764300000.75, 12345)
NOTE = json.dumps(asdict(COMMITTED)).encode()


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
        board = self._board(actor)
        yield from board.post(f"saves/{_INFO.save_id}", NOTE)
        yield from board.post("newest", str(_INFO.step).encode())
        self.ended_at[rank] = actor.now

    def watch(self, rank: int, actor: Actor) -> Steps[None]:
        """By a rank whose parts are written."""
        rules, parameters = self._world.rules, self._world.parameters
        self.trainers[rank] = actor
        board = self._board(actor)
        deadline = actor.now + parameters.timeout_secs
        looks_at = actor.now + rules.look_secs
        has_every_part = False
        looks = rules.everybody_looks or rank == 0
        poll = _FIRST_POLL_SECS
        while True:
            note = yield from board.read(f"saves/{_INFO.save_id}")
            now = actor.now
            if note is not None:
                self.ended_at[rank] = now
                return
            if now >= deadline or (looks and now >= looks_at):
                if (yield from self.look(actor)):
                    self.ended_at[rank] = actor.now
                    return
                looks_at = now + rules.look_secs
                if now >= deadline:
                    is_written = not looks or (yield from self._is_written(actor))
                    if has_every_part or not is_written:
                        self.ended_at[rank] = None
                        return
                    has_every_part = True
                    deadline += parameters.timeout_secs
                if rank == 0:
                    yield from self._help(actor)
            actor.now += poll
            poll = min(rules.end_poll_secs, poll * 1.5)

    def look(self, actor: Actor) -> Steps[bool]:
        """Whether the checkpoint is there: ``workers.commit.already_committed``."""
        yield from self._world.files.call(actor, Call.OPEN)
        if not self._world.directory.is_committed():
            return False
        yield from self._world.files.read(actor, self._world.costs.manifest_bytes)
        actor.now += self._world.costs.parse_secs
        return True

    def _is_written(self, actor: Actor) -> Steps[bool]:
        """Whether the save only has to be committed, which is worth as long again. Who does not look takes it to be so."""
        yield from self._world.files.list(actor, self._world.directory)
        return self._world.directory.has_every_receipt()

    def _help(self, actor: Actor) -> Steps[None]:
        """Rank 0: were there all receipts and no commit, it would commit. (That somebody else does, its worker sees by the
        lock; these calls are left out.)"""
        if not self._world.directory.is_committed():
            yield from self._world.files.list(actor, self._world.directory)

    def _board(self, actor: Actor) -> Board:
        return Board(self._world.store, actor, self._world.rules.wait_poll_secs)
