"""The thread that finishes staging: what must not stop halfway runs here, where no signal handler runs.

See NOTE [ Ctrl-C in save() ] in ``saver.py``. One thread runs the calls in their order. So whoever waits for the
newest call has waited for all.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

from stager.workers.long_wait import LongWait


class StagingThread:
    """One thread, started by the first call. :meth:`run` is called by one thread at a time."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="stager-stage")
        self._ident = 0  # of the thread that runs a call now; 0: none does
        self._newest = _done()

    def run(self, call: Callable[[], None]) -> Future[None]:
        """Run ``call`` in the thread, or at once if the interpreter is shutting down (an ``atexit`` handler saves)."""
        try:
            self._newest = self._executor.submit(self._run, call)
        except RuntimeError:  # no thread takes it any more; what it took before is still waited for
            self._run(call)
            return _done()
        return self._newest

    def _run(self, call: Callable[[], None]) -> None:
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
