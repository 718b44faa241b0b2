"""The job's key-value store, and how a rank uses it: ``rendezvous.py`` and ``rank_group.py`` in simulated time.

Bytes are those of keys and messages, either way; not counted: the store protocol's own, and counters.
"""

from __future__ import annotations

from stager.ranks.messages import Arrived, BarrierEnd, Message, encode
from tests.benchmarks.scale.parameters import Parameters
from tests.benchmarks.scale.simulation import Actor, Server, Simulation, Steps

PREFIX = "stager/0/"  # of the first Checkpointer of a process; torch's own prefix not counted
FIRST_POLL_SECS = 0.001


class Store:
    """The server, and what is in it.

    Attributes:
        num_requests, nbytes: that it was sent, and that went to and fro.
    """

    def __init__(self, simulation: Simulation, parameters: Parameters) -> None:
        assert parameters.store_service_secs is not None
        self.server = Server()
        self.num_requests = 0
        self.nbytes = 0
        self.notes: dict[str, bytes] = {}
        self.counts: dict[str, int] = {}
        self._simulation = simulation
        self._half_trip_secs = parameters.network_round_trip_secs / 2
        self._service_secs = parameters.store_service_secs

    def request(self, actor: Actor, nbytes: int) -> Steps[None]:
        """Comes back when the server has it; the actor's clock is then at the answer."""
        yield actor.now + self._half_trip_secs
        actor.now = self.server.take(self._simulation.now, self._service_secs) + self._half_trip_secs
        actor.num_requests += 1
        self.num_requests += 1
        self.nbytes += nbytes


class SimulatedGroup:
    """One rank, as ``RankGroup`` sees it.

    Args:
        last_poll_secs: between two looks for a message that is waited for, in the end.
    """

    def __init__(self, store: Store, actor: Actor, last_poll_secs: float) -> None:
        self._store = store
        self._actor = actor
        self._last_poll_secs = last_poll_secs

    def post(self, key: str, message: Message) -> Steps[None]:
        key, note = PREFIX + key, encode(message)
        yield from self._store.request(self._actor, len(key) + len(note))
        self._store.notes[key] = note

    def read(self, key: str) -> Steps[bytes | None]:
        """One request; where there is a message, two."""
        key = PREFIX + key
        yield from self._store.request(self._actor, len(key))
        if key not in self._store.notes:
            return None
        yield from self._store.request(self._actor, len(key) + len(self._store.notes[key]))
        return self._store.notes[key]

    def count(self, key: str, amount: int = 1) -> Steps[int]:
        key = PREFIX + key
        yield from self._store.request(self._actor, len(key))
        count = self._store.counts[key] = self._store.counts.get(key, 0) + amount
        return count

    def receive(self, key: str) -> Steps[bytes]:
        """For as long as it takes: nobody fails to come in this simulation."""
        poll = FIRST_POLL_SECS
        while (note := (yield from self.read(key))) is None:
            self._actor.now += poll
            poll = min(self._last_poll_secs, poll * 2)
        return note

    def post_first(self, key: str, message: Message) -> Steps[None]:
        if (yield from self.count(f"{key}/count")) == 1:
            yield from self.post(key, message)

    def contribute(self, key: str, message: Message, at_most: int | None = None) -> Steps[None]:
        number = yield from self.count(f"{key}/count")
        if at_most is None or number <= at_most:
            yield from self.post(f"{key}/{number}", message)

    def gather(self, key: str, at_most: int | None = None) -> Steps[list[bytes]]:
        num = yield from self.count(f"{key}/count", 0)
        notes = []
        for number in range(1, min(num, at_most or num) + 1):
            notes.append((yield from self.receive(f"{key}/{number}")))
        return notes

    def barrier(self, key: str, rank: int, num_ranks: int) -> Steps[None]:
        yield from self.post(f"{key}/here/{rank}", Arrived())
        if (yield from self.count(f"{key}/arrived")) == num_ranks:
            yield from self.post_first(f"{key}/end", BarrierEnd())
        yield from self.receive(f"{key}/end")
