"""The thread that finishes staging: what must not stop halfway runs here, where no signal handler runs.

See NOTE [ Ctrl-C in save() ] in ``snapshot_stager.py``. One thread runs the calls in their order. So whoever waits for the
newest call has waited for all.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any

from stager.workers.long_wait import LongWait


class StagingThread:
    """One thread, which lives from here on. :meth:`run` is called by one thread at a time.

    It is started by the constructor: Ctrl-C in a ``save()`` that started it could leave a thread that nobody knows of, and
    two calls would run at once. If it cannot be started, each call runs in the thread that asks for it.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="stager-stage")
        self._ident = 0  # of the thread that runs a call now; 0: none does
        self._newest = _done()
        self._one_at_a_time = threading.Lock()
        try:
            self._executor.submit(int).result()
            self._has_thread = True
        except RuntimeError:  # the interpreter is shutting down, or there are too many threads
            self._has_thread = False

    def run(self, call: Callable[[], None]) -> Future[None]:
        """Run ``call`` in the thread, or at once if the interpreter is shutting down (an ``atexit`` handler saves)."""
        if self._has_thread:
            with suppress(RuntimeError):  # the interpreter is shutting down, so the thread takes no further call
                self._newest = self._executor.submit(self._run, call)
                return self._newest
        wait([self._newest])  # the calls that it took come first
        self._run(call)
        return _done()

    def _run(self, call: Callable[[], None]) -> None:
        with self._one_at_a_time:
            self._ident = threading.get_ident()
            try:
                call()
            finally:
                self._ident = 0  # the thread's number, or the main thread's, must not look like a callback's afterwards

    @property
    def is_busy(self) -> bool:
        """Whether a call runs or waits to run."""
        return not self._newest.done()

    @property
    def is_current(self) -> bool:
        """Whether the caller is in the staging thread."""
        return threading.get_ident() == self._ident

    def wait(self, timeout: float | None = None) -> None:
        """Wait until every call given to :meth:`run` so far has ended.

        Raises:
            TimeoutError: one of them has not ended after ``timeout`` seconds.
        """
        # The newest call runs last. It is read once: a call that another thread adds meanwhile is not waited for.
        newest = self._newest
        if newest.done():  # nearly always; an optimizer's every step asks
            return
        staged = LongWait("a snapshot to be taken", timeout).until(
            lambda secs: not wait([newest], secs).not_done, timeout
        )
        if not staged:
            raise TimeoutError(f"the snapshots of the saves that were begun were not all taken within {timeout:g} s")

    def close(self) -> None:
        """Wait for the calls, and end the thread."""
        self._executor.shutdown()


def _done() -> Future[None]:
    future: Future[None] = Future()
    future.set_result(None)
    return future


def wait_uninterrupted(futures: Sequence[Future[Any]]) -> None:
    """Wait until all are done, even after Ctrl-C: they use memory that is used for something else afterwards.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed meanwhile; all are done then.
    """
    interrupted: KeyboardInterrupt | None = None
    while True:
        try:
            wait(futures)
            break
        except KeyboardInterrupt as error:
            interrupted = error
    if interrupted is not None:
        raise interrupted
