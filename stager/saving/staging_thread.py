"""The thread that finishes staging: what must not stop halfway runs here, where no signal handler runs.

See NOTE [ Ctrl-C in save() ] in ``saver.py``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait


class StagingThread:
    """One thread, started when it is first needed. Calls run in the order of asking."""

    def __init__(self) -> None:
        self._executor: ThreadPoolExecutor | None = None
        self._ident = 0  # of the thread that runs a call now; 0: none does
        self._pending: set[Future[None]] = set()
        self._lock = threading.Lock()

    def run(self, call: Callable[[], None]) -> Future[None]:
        """Run ``call`` in the thread, or at once if the interpreter is shutting down (an ``atexit`` handler saves)."""
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="stager-stage")
        try:
            future = self._executor.submit(self._run, call)
        except RuntimeError:  # no thread takes it any more
            self._run(call)
            future = Future()
            future.set_result(None)
            return future
        with self._lock:
            self._pending.add(future)
        future.add_done_callback(self._forget)
        return future

    def _run(self, call: Callable[[], None]) -> None:
        self._ident = threading.get_ident()
        try:
            call()
        finally:
            self._ident = 0

    def _forget(self, future: Future[None]) -> None:
        with self._lock:
            self._pending.discard(future)

    @property
    def is_busy(self) -> bool:
        """Whether a call runs or waits to run."""
        with self._lock:
            return bool(self._pending)

    @property
    def is_current(self) -> bool:
        """Whether the caller is in the staging thread."""
        return threading.get_ident() == self._ident

    def wait(self, timeout: float | None = None) -> None:
        """Wait until every call asked for so far has ended.

        Args:
            timeout: seconds; None: as long as it takes.

        Raises:
            TimeoutError: a call has not ended by then.
        """
        with self._lock:
            pending = set(self._pending)
        if pending and wait(pending, timeout).not_done:
            raise TimeoutError(f"a snapshot was not taken within {timeout:g} s")

    def close(self) -> None:
        """Wait for the calls, and end the thread."""
        if self._executor is not None:
            self._executor.shutdown()
