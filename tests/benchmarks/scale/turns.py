"""The simulation's clock, store and file system for the real code, which runs in threads that take turns."""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch.distributed.distributed_c10d import Store

from stager.workers.checkpoint.commit.commit import Committed
from stager.workers.checkpoint.write.save_spec import SaveSpec
from tests.benchmarks.scale.costs import Costs
from tests.benchmarks.scale.parameters import Parameters
from tests.benchmarks.scale.simulation import Server


class Turns:
    """A clock that moves when every thread waits for it. Stands in for the module ``time``.

    One thread runs at a time, the one whose moment has come: so what happens is the same every time, and takes no locks.

    Attributes:
        now: seconds.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._agenda: list[tuple[float, int, threading.Event]] = []
        self._numbers = itertools.count()

    def monotonic(self) -> float:
        return self.now

    def sleep(self, secs: float) -> None:
        self.until(self.now + secs)

    def until(self, moment: float) -> None:
        turn = self._enter(moment)
        self._pass_on()
        turn.wait()

    def run(self, starts: Sequence[float], body: Callable[[int], None]) -> None:
        """``body(0)`` from ``starts[0]`` on, and so on; until all have ended."""
        turns = [self._enter(start) for start in starts]

        def wait_and_run(number: int) -> None:
            turns[number].wait()
            try:
                body(number)
            finally:
                self._pass_on()

        with ThreadPoolExecutor(len(starts)) as threads:
            futures = [threads.submit(wait_and_run, number) for number in range(len(starts))]
            self._pass_on()
        for future in futures:
            future.result()

    def _enter(self, moment: float) -> threading.Event:
        turn = threading.Event()
        heapq.heappush(self._agenda, (moment, next(self._numbers), turn))
        return turn

    def _pass_on(self) -> None:
        if self._agenda:
            self.now, _, turn = heapq.heappop(self._agenda)
            turn.set()


class NothingPendingError(Exception):
    """Whoever waits for something to do has nothing more to do in this test."""


class TurnCondition(threading.Condition):
    """Waits by the clock. Nobody notifies in these tests but the thread itself."""

    def __init__(self, turns: Turns) -> None:
        super().__init__()
        self._turns = turns

    def wait(self, timeout: float | None = None) -> bool:
        if timeout is None:
            raise NothingPendingError
        self._turns.sleep(timeout)
        return False


class TurnStore(Store):
    """A store in memory whose answers take their time.

    Attributes:
        num_requests, nbytes: as in :class:`tests.benchmarks.scale.store.Store`.
    """

    def __init__(self, turns: Turns, parameters: Parameters) -> None:
        super().__init__()
        assert parameters.store_service_secs is not None
        self.num_requests = 0
        self.nbytes = 0
        self._turns = turns
        self._half_trip_secs = parameters.network_round_trip_secs / 2
        self._service_secs = parameters.store_service_secs
        self._server = Server()
        self._notes: dict[str, bytes] = {}
        self._counts: dict[str, int] = {}

    def set(self, key: str, value: Any) -> None:
        answer_at = self._arrive(len(key) + len(value))
        self._notes[key] = value
        self._turns.until(answer_at)

    def get(self, key: str) -> bytes:
        answer_at = self._arrive(len(key) + len(self._notes[key]))
        note = self._notes[key]
        self._turns.until(answer_at)
        return note

    def add(self, key: str, amount: int) -> int:
        answer_at = self._arrive(len(key))
        count = self._counts[key] = self._counts.get(key, 0) + amount
        self._turns.until(answer_at)
        return count

    def check(self, keys: list[str]) -> bool:
        answer_at = self._arrive(sum(map(len, keys)))
        there = self._notes.keys() >= set(keys)
        self._turns.until(answer_at)
        return there

    def _arrive(self, nbytes: int) -> float:
        """Until a request is at the server; when its answer is here."""
        self._turns.sleep(self._half_trip_secs)
        self.num_requests += 1
        self.nbytes += nbytes
        return self._server.take(self._turns.now, self._service_secs) + self._half_trip_secs


class TurnDirectory:
    """What ``CommitWatch`` sees of the directory of a save.

    Args:
        commit: what is read of it when it is committed.
        names: of the files in the partial directory.

    Attributes:
        committed: it is there under its final name.
        num_calls: to the metadata server.
    """

    def __init__(
        self, turns: Turns, parameters: Parameters, costs: Costs, commit: Committed, names: Sequence[str]
    ) -> None:
        self._commit = commit
        self._names = list(names)
        self.committed = False
        self.num_calls = 0
        self._turns = turns
        self._parameters = parameters
        self._costs = costs
        self._half_trip_secs = parameters.metadata_round_trip_secs / 2
        self._metadata, self._data = Server(), Server()

    def already_committed(self, _: SaveSpec) -> Committed | None:
        """Stands in for ``stager.workers.checkpoint.commit.commit.already_committed``."""
        there = self._call(self._parameters.open_secs)
        if not there:
            return None
        self._turns.sleep(self._half_trip_secs)
        nbytes, parameters = self._costs.manifest_bytes, self._parameters
        done = self._data.take(self._turns.now, nbytes / parameters.file_system_bytes_per_sec)
        own = self._turns.now + nbytes / parameters.client_bytes_per_sec
        self._turns.until(max(done, own) + self._half_trip_secs)
        self._turns.sleep(self._costs.parse_secs)
        return self._commit

    def file_names(self, _: SaveSpec) -> list[str]:
        """Stands in for ``stager.workers.checkpoint.commit.commit.partial_file_names``."""
        self._call(0.0)
        return self._names

    def _call(self, secs: float) -> bool:
        self._turns.sleep(self._half_trip_secs)
        self.num_calls += 1
        there = self.committed
        self._turns.until(self._metadata.take(self._turns.now, secs) + self._half_trip_secs)
        return there
