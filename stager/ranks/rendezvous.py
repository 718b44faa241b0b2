"""The ranks' notice rendezvous: short notes in the key-value store that the job's process group was made with.

Nothing here is a collective: a note is posted or read by one request to the store's server, and whoever waits for a note
says for how long. A server that does not answer (its process was stopped, its host froze) is given up after a while:
torch's TCPStore, as of 2.13, then waits for ever, whatever its timeout. So requests are made by a thread of the board's,
which nobody has to wait for.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, TypeVar

from torch.distributed.distributed_c10d import PrefixStore, Store

from stager.workers.errors import RankFailedError

T = TypeVar("T")

_FIRST_POLL_SECS = 0.001
_LAST_POLL_SECS = 0.05
_POLL_SECS_PER_RANK = 2e-5  # all ranks together ask 50,000 times a second at most, which is what a server can answer

_Request = tuple[Callable[[], Any], "Future[Any]"]


def poll_secs(num_ranks: int, at_least: float) -> float:
    """Between two questions of a rank to the store, when all ranks may be asking."""
    return max(at_least, num_ranks * _POLL_SECS_PER_RANK)


class Rendezvous:
    """
    Args:
        store: of the job; shared with others, who use other keys.
        prefix: of the keys.
        num_ranks: that ask the store's server.
        answer_secs: how long the store's server may take to answer.

    Every method raises RankFailedError when the store cannot be reached: the process that serves it is gone, or silent.
    """

    def __init__(self, store: Store, prefix: str, num_ranks: int, answer_secs: float = 30.0) -> None:
        self._store: Any = PrefixStore(prefix, store)
        self._num_ranks = num_ranks
        self._answer_secs = answer_secs
        self._requests: queue.SimpleQueue[_Request] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._process = -1  # that the thread is in
        self._stuck: Future[Any] | None = None

    @property
    def store(self) -> Store:
        """The job's, with the prefix: for a process group of one's own."""
        store: Store = self._store
        return store

    def post(self, key: str, note: bytes) -> None:
        self._ask(lambda: self._store.set(key, note))

    def read(self, key: str) -> bytes | None:
        """The note; None if there is none yet."""
        return self._ask(lambda: bytes(self._store.get(key)) if self._store.check([key]) else None)

    def add(self, key: str, amount: int = 1) -> int:
        """Count up; the new count."""
        return self._ask(lambda: int(self._store.add(key, amount)))

    def wait(self, key: str, timeout_secs: float) -> bytes | None:
        """The note; None if nobody has posted one within ``timeout_secs``. Ctrl-C gets through."""
        deadline, poll, longest = (
            time.monotonic() + timeout_secs,
            _FIRST_POLL_SECS,
            poll_secs(self._num_ranks, _LAST_POLL_SECS),
        )
        while (note := self.read(key)) is None:
            if time.monotonic() >= deadline:
                return None
            time.sleep(poll)
            poll = min(longest, poll * 2)
        return note

    def _ask(self, request: Callable[[], T]) -> T:
        with self._lock:
            if self._is_stuck():
                raise self._silent()
            if self._thread is None or self._process != os.getpid():
                self._process = os.getpid()
                self._thread = threading.Thread(target=_serve, args=(self._requests,), name="stager-board", daemon=True)
                self._thread.start()
        answer: Future[T] = Future()
        self._requests.put((request, answer))
        try:
            return answer.result(self._answer_secs)
        except FutureTimeoutError:
            if answer.done():  # the store's own error is of this type
                raise
            with self._lock:
                self._stuck = answer
            raise self._silent() from None
        except RuntimeError as error:
            raise RankFailedError(
                f"the job's store cannot be reached; the process that serves it is gone ({error})", ()
            ) from error

    def _is_stuck(self) -> bool:
        return self._stuck is not None and not self._stuck.done()

    def _silent(self) -> RankFailedError:
        return RankFailedError(
            f"the job's store has not answered for {self._answer_secs:g} s; the process that serves it is stopped",
            (),
        )

    def close(self) -> None:
        """End the thread. It is begun again by the next request."""
        with self._lock:
            thread, self._thread = self._thread, None
        if thread is not None and self._process == os.getpid():
            self._requests.put((_stop, Future()))
            thread.join(0 if self._is_stuck() else None)


def _stop() -> None:
    raise SystemExit


def _serve(requests: queue.SimpleQueue[_Request]) -> None:
    while True:
        request, answer = requests.get()
        if request is _stop:
            return
        try:
            answer.set_result(request())
        except BaseException as error:  # noqa: BLE001  # it is the asker's
            answer.set_exception(error)
