"""The rendezvous of the ranks: a key-value store in which they post, read and count.

The store is the one that the job's process group was made with. Nothing here is a collective: a rank posts or reads by one
request to the store's server, and whoever waits for a key says for how long.

A server may stop answering, because its process was stopped or its host froze. A rank gives such a server up after a while.
torch's TCPStore (2.13) does not: it waits for ever, whatever its timeout. So a thread of the rendezvous makes the requests,
and nobody has to wait for that thread.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, TypeAlias, TypeVar

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from stager.workers.errors import RankFailedError

T = TypeVar("T")
_Requests: TypeAlias = "queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None]"  # None ends the thread

_FIRST_POLL_SECS = 0.001
_LAST_POLL_SECS = 0.05
_POLL_SECS_PER_RANK = 2e-5  # all ranks together ask 50,000 times a second at most, which is what a server can answer

_dist: Any = dist  # not all of it is annotated


def poll_secs(num_ranks: int, at_least: float) -> float:
    """Seconds between two requests of a rank that polls, when all ranks may be polling."""
    return max(at_least, num_ranks * _POLL_SECS_PER_RANK)


class Rendezvous:
    """The store, as one rank uses it.

    Every method raises RankFailedError when the store cannot be reached: the process that serves it is gone, or has not
    answered for ``answer_secs``. Others use the store, too, with keys of another prefix.
    """

    def __init__(self, store: Store, prefix: str, num_ranks: int, answer_secs: float = 30.0) -> None:
        self._store: Any = PrefixStore(prefix, store)
        self._num_ranks = num_ranks
        self._answer_secs = answer_secs
        self._requests: _Requests = queue.SimpleQueue()
        self._lock = threading.Lock()  # guards the thread, and which request it is stuck in
        self._thread: threading.Thread | None = None
        self._process = -1  # that the thread is in
        self._unanswered: Future[Any] = Future()  # the request that was given up
        self._unanswered.cancel()

    def store_at(self, key: str) -> Store:
        """The job's store for what is under a key, to make a process group with."""
        return PrefixStore(key, self._store)

    def post(self, key: str, data: bytes) -> None:
        """Set a key."""
        self._ask(lambda: self._store.set(key, data))

    def read(self, key: str) -> bytes | None:
        """The data of a key; None if nobody has posted it yet."""
        return self._ask(lambda: bytes(self._store.get(key)) if self._store.check([key]) else None)

    def add(self, key: str, amount: int = 1) -> int:
        """Add to a counter. Returns the new count."""
        return self._ask(lambda: int(self._store.add(key, amount)))

    def wait(self, key: str, timeout_secs: float, waiting: Callable[[], None] = lambda: None) -> bytes | None:
        """The data of a key; None if nobody posts it within ``timeout_secs``. Ctrl-C gets through.

        Args:
            waiting: called now and then while it waits.
        """
        deadline = time.monotonic() + timeout_secs
        poll, longest = _FIRST_POLL_SECS, poll_secs(self._num_ranks, _LAST_POLL_SECS)
        while (data := self.read(key)) is None:
            if time.monotonic() >= deadline:
                return None
            waiting()
            time.sleep(poll)
            poll = min(longest, poll * 2)
        return data

    def _ask(self, request: Callable[[], T]) -> T:
        with self._lock:
            # While the thread is stuck in one request, all that come behind it fail at once. When the server answers that
            # one after all, the thread serves again.
            if not self._unanswered.done():
                raise self._silent()
            if self._thread is None or self._process != os.getpid():  # a fork has no threads
                self._process = os.getpid()
                self._thread = threading.Thread(
                    target=_serve, args=(self._requests,), name="stager-rendezvous", daemon=True
                )
                self._thread.start()
        answer: Future[T] = Future()
        self._requests.put((request, answer))
        try:
            return answer.result(self._answer_secs)
        except FutureTimeoutError:
            if answer.done():  # the store's own error is of this type
                raise
            with self._lock:
                self._unanswered = answer
            raise self._silent() from None
        except RuntimeError as error:
            raise RankFailedError(
                f"the job's store cannot be reached ({error}); most likely the process that serves it has ended: "
                "look at the log of rank 0",
                (),
            ) from error

    def _silent(self) -> RankFailedError:
        secs = f"{self._answer_secs:g} s"
        return RankFailedError(
            f"the job's store has not answered for {secs}; the process that serves it is stopped", ()
        )

    def close(self) -> None:
        """End the thread. The next request starts it again."""
        with self._lock:
            thread, self._thread = self._thread, None
        if thread is not None and self._process == os.getpid():
            self._requests.put(None)
            thread.join(None if self._unanswered.done() else 0)  # a thread that is stuck may never end


class LocalRendezvous(Rendezvous):
    """The rendezvous of a group of one: in this process, answers at once, and needs no thread."""

    def __init__(self) -> None:
        super().__init__(_dist.HashStore(), "stager", num_ranks=1)

    def _ask(self, request: Callable[[], T]) -> T:
        return request()


def _serve(requests: _Requests) -> None:
    while (entry := requests.get()) is not None:
        request, answer = entry
        try:
            answer.set_result(request())
        except BaseException as error:  # noqa: BLE001  # it is the asker's
            answer.set_exception(error)
        del entry, request, answer  # the answer is not kept while this thread waits
