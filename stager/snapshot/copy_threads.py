"""The threads that copy a snapshot: those of the trainer's priority, for while it waits, and those that yield to it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

from stager.config.host import lower_priority

Call = Callable[[], None]


class CopyThreads:
    """Runs calls on several threads, which are started when first needed.

    Args:
        num_threads: while the trainer waits, the caller's included.
        num_background_threads: while training goes on. They have a lower priority.
    """

    def __init__(self, num_threads: int, num_background_threads: int) -> None:
        self._foreground = _Pool(num_threads, None)
        self._background = _Pool(num_background_threads, lower_priority)
        self._in_background: _Job | None = None
        self._waiting: set[object] = set()  # one for each hurried() that is entered

    def run(self, calls: Sequence[Call]) -> None:
        """Run calls on the calling thread and others. Raises what one of them raises; the rest may not run then."""
        job = _Job(calls)
        try:
            job.ask(self._foreground, min(self._foreground.count, len(calls)) - 1)
            job.work()
        except BaseException:
            job.drop()
            raise
        finally:
            job.finish()
        job.raise_error()

    def run_in_background(self, calls: Sequence[Call]) -> None:
        """Run calls on threads that yield to the trainer. Raises as :meth:`run`; not for a thread that gets signals."""
        job = _Job(calls)
        self._in_background = (
            job  # before the question: hurried() does it the other way round, so that one sees the other
        )
        try:
            is_asked = job.ask(self._background, min(self._background.count, len(calls)))
            if self._waiting:
                job.ask(self._foreground, min(self._foreground.count, len(calls)))
            if is_asked:
                job.wait()
            else:
                job.work()
        finally:
            self._in_background = None
            job.finish()
        job.raise_error()

    @contextmanager
    def hurried(self) -> Iterator[None]:
        """While it is entered, calls in the background are also run by the threads for while the trainer waits."""
        who = object()
        try:
            self._waiting.add(who)
            if (job := self._in_background) is not None:
                job.ask(self._foreground, self._foreground.count)
            yield
        finally:
            self._waiting.discard(who)

    @property
    def several_in_background(self) -> bool:
        """Whether calls in the background run on more than one thread."""
        return self._background.count > 1 or bool(self._waiting)

    def close(self) -> None:
        """End the threads."""
        self._foreground.close()
        self._background.close()


class _Pool:
    """Threads.

    Args:
        begin: called by each of them first.
    """

    def __init__(self, count: int, begin: Callable[[], None] | None) -> None:
        self.count = count
        self._begin = begin
        self._executor: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    def submit(self, call: Call) -> None:
        """Have one of them run a call. RuntimeError: the interpreter is shutting down."""
        with self._lock:
            if self._executor is None:
                self._executor = ThreadPoolExecutor(
                    self.count, thread_name_prefix="stager-copy", initializer=self._begin
                )
            executor = self._executor
        executor.submit(call)

    def close(self) -> None:
        with self._lock:
            executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown()


class _Job:
    """Calls that several threads run, each the next one that is left.

    Who waits does not wait for threads that were asked and have not begun: on a busy host that may be late.
    """

    def __init__(self, calls: Sequence[Call]) -> None:
        self._left = iter(calls)  # next() on an iterator over a list is atomic, so each call is taken once
        self._errors: list[BaseException] = []
        self._changed = threading.Condition()
        self._is_open = True
        self._num_inside = 0
        self._has_left = False  # a thread has: no call is left then

    def ask(self, pool: _Pool, count: int) -> bool:
        """Have threads of a pool take part. Returns whether one will."""
        is_asked = False
        with suppress(RuntimeError):  # the interpreter is shutting down: no thread can be asked any more
            for _ in range(count):
                pool.submit(self._take_part)
                is_asked = True
        return is_asked

    def _take_part(self) -> None:
        with self._changed:
            if not self._is_open:
                return
            self._num_inside += 1
        try:
            self.work()
        except BaseException as error:  # noqa: BLE001  # raise_error() raises it
            self._errors.append(error)
        finally:
            with self._changed:
                self._num_inside -= 1
                self._has_left = True
                self._changed.notify_all()

    def work(self) -> None:
        """Run calls until none is left. After an error, none is."""
        try:
            for call in self._left:
                call()
        except BaseException:
            self.drop()
            raise

    def drop(self) -> None:
        """Leave the calls that no thread has begun."""
        deque(self._left, maxlen=0)

    def wait(self) -> None:
        """Wait until no call is left that no thread has begun."""
        with self._changed:
            self._changed.wait_for(lambda: self._has_left)

    def finish(self) -> None:
        """Let no further thread take part, and wait until those that do have ended: they write into the slab.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed meanwhile; they have ended then.
        """
        interrupted: KeyboardInterrupt | None = None
        while True:
            try:
                with self._changed:
                    self._is_open = False
                    self._changed.wait_for(lambda: not self._num_inside)
                break
            except KeyboardInterrupt as error:
                interrupted = error
        if interrupted is not None:
            raise interrupted

    def raise_error(self) -> None:
        """Raise the first error of a call."""
        if self._errors:
            raise self._errors[0]
