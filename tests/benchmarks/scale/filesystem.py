"""A shared file system: a server for its metadata, one stream of data for all, and the directory that a save goes to.

What is counted as a call goes to the metadata server: to look up, open, create, rename or remove a name, ``stat``,
``truncate``, ``listdir``, ``flock``. ``fstat`` and ``close`` of what is open are not.
"""

from __future__ import annotations

from collections import Counter
from enum import Enum

from tests.benchmarks.scale.parameters import Parameters
from tests.benchmarks.scale.simulation import PARKED, Actor, Server, Simulation, Steps


class Call(Enum):
    OPEN = "open"
    ATTRIBUTES = "attributes"
    LOCK = "lock"
    CREATE = "create"
    RENAME = "rename"
    UNLINK = "unlink"
    LIST = "list"


class FileSystem:
    """Attributes:
    calls: to the metadata server, by kind.
    num_listed: names in all that was listed.
    num_reads, num_syncs: of files; of files and directories.
    """

    def __init__(self, simulation: Simulation, parameters: Parameters) -> None:
        self.metadata = Server()
        self.calls: Counter[Call] = Counter()
        self.num_listed = 0
        self.num_reads = 0
        self.num_syncs = 0
        self._simulation = simulation
        self._parameters = parameters
        self._half_trip_secs = parameters.metadata_round_trip_secs / 2
        self._data = Server()
        self._secs = {
            Call.OPEN: parameters.open_secs,
            Call.ATTRIBUTES: parameters.attributes_secs,
            Call.LOCK: parameters.lock_secs,
            Call.CREATE: parameters.create_secs,
            Call.RENAME: parameters.rename_secs,
            Call.UNLINK: parameters.unlink_secs,
            Call.LIST: 0.0,
        }

    def call(self, actor: Actor, call: Call) -> Steps[None]:
        """Comes back when the server does it; the actor's clock is then at the answer."""
        yield actor.now + self._half_trip_secs
        self._do(actor, call, self._secs[call])

    def list(self, actor: Actor, directory: Directory) -> Steps[None]:
        yield actor.now + self._half_trip_secs
        self._do(actor, Call.LIST, directory.num_names * self._parameters.entry_secs)
        self.num_listed += directory.num_names

    def _do(self, actor: Actor, call: Call, secs: float) -> None:
        actor.now = self.metadata.take(self._simulation.now, secs) + self._half_trip_secs
        actor.num_calls += 1
        self.calls[call] += 1

    def read(self, actor: Actor, nbytes: float) -> Steps[None]:
        """The bytes of an open file."""
        yield actor.now + self._half_trip_secs
        now, parameters = self._simulation.now, self._parameters
        done = self._data.take(now, nbytes / parameters.file_system_bytes_per_sec)
        actor.now = max(done, now + nbytes / parameters.client_bytes_per_sec) + self._half_trip_secs
        self.num_reads += 1

    def sync(self, actor: Actor) -> None:
        actor.now += self._parameters.fsync_secs
        self.num_syncs += 1

    def write_atomically(self, actor: Actor, directory: Directory, nbytes: float = 0.0) -> Steps[None]:
        """``stager.workers.checkpoint.storage.posix.files.write_atomically``: create, write, sync, rename."""
        yield from self.call(actor, Call.CREATE)
        directory.num_names += 1
        actor.now += nbytes / self._parameters.client_bytes_per_sec
        self.sync(actor)
        yield from self.call(actor, Call.RENAME)


class Directory:
    """The partial directory of a save, and its lock: see NOTE [ The lock on a partial directory ] in ``commit.py``.

    Args:
        num_parts: of all ranks.

    Attributes:
        num_names: in it.
        num_receipts: of these.
    """

    def __init__(self, simulation: Simulation, files: FileSystem, num_parts: int) -> None:
        self._num_parts = num_parts
        self.num_names = 0
        self.num_receipts = 0
        self._is_committed = False
        self._simulation = simulation
        self._files = files
        self._num_sharing = 0
        self._is_taken = False
        self._waiting: list[Steps[None]] = []

    def commit(self) -> None:
        """Give it its final name."""
        self._is_committed = True

    def has_every_receipt(self) -> bool:
        return self.num_receipts == self._num_parts

    def is_committed(self) -> bool:
        return self._is_committed

    def share(self, actor: Actor) -> Steps[None]:
        """Wait for whoever has it alone."""
        yield from self._files.call(actor, Call.LOCK)
        while self._is_taken:
            self._waiting.append(self._simulation.current())
            yield PARKED
            actor.now = max(actor.now, self._simulation.now)
        self._num_sharing += 1

    def take(self, actor: Actor) -> Steps[bool]:
        """Have it alone, if nobody has it."""
        yield from self._files.call(actor, Call.LOCK)
        if self._is_taken or self._num_sharing:
            return False
        self._is_taken = True
        return True

    def release(self, actor: Actor) -> Steps[None]:
        """By who has it, alone or not."""
        yield actor.now
        if not self._is_taken:
            self._num_sharing -= 1
            return
        self._is_taken = False
        waiting, self._waiting = self._waiting, []
        for process in waiting:
            self._simulation.start(process, self._simulation.now)
