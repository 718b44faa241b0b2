"""The worker's end of its socket: waits for tasks and for room to reply, and notices that the trainer is gone."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Sequence
from contextlib import suppress

from stager.workers.pool.channel import Frame, Inbox, Outbox
from stager.workers.pool.messages import Message

_THROTTLED_MS = 50


class TrainerChannel:
    """Frames from and to the trainer. Used by one thread.

    Args:
        fd: the socket; closed with the process and not before, so that the trainer sees end-of-file only then.
        parent: a pidfd of the trainer; -1 when it is gone already.
    """

    def __init__(self, fd: int, parent: int) -> None:
        self._sock = socket.socket(fileno=fd)
        self._sock.setblocking(False)
        self._parent = parent
        self._inbox = Inbox(self._sock)
        self._outbox = Outbox(self._sock)

    def receive(self) -> Frame | None:
        """The next frame; None when there will be none: the trainer has hung up, or is gone and the socket is empty."""
        while (frame := self._inbox.take()) is None:
            orphaned = self._parent < 0
            readable = self._wait(select.POLLIN, timeout_ms=0 if orphaned else None)
            if readable:
                try:
                    if not self._inbox.receive():
                        return None
                except ConnectionError:
                    return None
                except BlockingIOError:
                    continue
            elif orphaned:
                return None
        return frame

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Returns when the message is sent, or when there is nobody to send it to."""
        self._outbox.put(message, fds)
        with suppress(ConnectionError):
            while not self._outbox.flush() and self._parent >= 0:
                if self._outbox.throttled:
                    self._wait(0, _THROTTLED_MS)
                else:
                    self._wait(select.POLLOUT, None)
        self._outbox.drop()  # an orphan's: a process that the trainer forked may hold the other end, and never reads

    def _wait(self, events: int, timeout_ms: int | None) -> bool:
        """Whether the socket is ready; also returns, and notes it, when the trainer is gone."""
        poll = select.poll()
        if events:
            poll.register(self._sock, events)
        if self._parent >= 0:
            poll.register(self._parent, select.POLLIN)
        ready = dict(poll.poll(timeout_ms))
        if self._parent in ready:
            os.close(self._parent)
            self._parent = -1
        return self._sock.fileno() in ready
