"""Ending the supervisor's wait from another thread."""

from __future__ import annotations

import os
import threading
from contextlib import suppress

from stager.workers.pool import codec


class Wakeup:
    """A pipe; the supervisor polls ``fd``."""

    def __init__(self) -> None:
        self.fd, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._lock = threading.Lock()  # after close() the number may be somebody else's file: never write to it then

    def set(self) -> None:
        with self._lock:
            if self._write >= 0:
                with suppress(BlockingIOError):  # full: it will wake up as it is
                    os.write(self._write, b"!")

    def clear(self) -> None:
        with suppress(BlockingIOError):
            os.read(self.fd, 4096)

    def close(self) -> None:
        with self._lock:
            self.close_in_forked_child()

    def close_in_forked_child(self) -> None:
        """Without the lock, which a thread that does not exist here may hold."""
        fds = [fd for fd in (self.fd, self._write) if fd >= 0]
        self.fd = self._write = -1
        codec.close_fds(fds)
