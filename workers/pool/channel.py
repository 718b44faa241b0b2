"""Frames with file descriptors over one Unix stream socket.

A frame is ``<IQ`` (number of descriptors, payload length in bytes), one byte per batch of descriptors with the batch
attached to it (``SCM_RIGHTS`` takes 253 at a time), then the payload, which is a pickled :data:`messages.Message`.
``Outbox`` and ``Inbox`` do the framing, and never wait. ``TrainerChannel``, the worker's end, waits for both.
"""

from __future__ import annotations

import array
import errno
import os
import pickle
import select
import socket
import struct
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from stager.workers.pool.codec import close_fds
from stager.workers.pool.messages import Message

_HEADER = struct.Struct("<IQ")
_FDS_PER_BATCH = 253  # SCM_MAX_FD of Linux
_READ_BYTES = 1 << 18
_THROTTLED_MS = 50
_ANCILLARY_BYTES = socket.CMSG_SPACE(_FDS_PER_BATCH * array.array("i").itemsize)
# The kernel has no room for more descriptors in flight, or no memory, at this moment.
_TRY_LATER = frozenset({errno.ETOOMANYREFS, errno.ENOBUFS, errno.ENOMEM})


@dataclass(frozen=True, slots=True)
class Frame:
    """A message as it arrived.

    Attributes:
        message: what was sent.
        fds: its descriptors; whoever takes the frame owns them.
        whole: False when this process was out of descriptors and the kernel dropped some: ``fds`` is then empty.
    """

    message: Message
    fds: list[int]
    whole: bool


class Outbox:
    """Messages on their way out of a non-blocking socket. Not thread-safe: the owner holds its lock.

    The descriptors given to :meth:`put` are borrowed: they must stay open until the message is out, or dropped.

    Attributes:
        throttled: the last :meth:`flush` ended because the kernel is short of something. The socket may be writable all the
            same, so polling it would not wait: try again a moment later.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._chunks: deque[tuple[memoryview, Sequence[int]]] = deque()
        self.throttled = False

    def __bool__(self) -> bool:
        return bool(self._chunks)

    def put(self, message: Message, fds: Sequence[int] = ()) -> None:
        payload = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        self._chunks.append((memoryview(_HEADER.pack(len(fds), len(payload))), ()))
        for start in range(0, len(fds), _FDS_PER_BATCH):
            self._chunks.append((memoryview(b"F"), fds[start : start + _FDS_PER_BATCH]))
        self._chunks.append((memoryview(payload), ()))

    def flush(self) -> bool:
        """Send what the socket takes now; True when nothing is left. Raises OSError if the peer is gone."""
        self.throttled = False
        while self._chunks:
            data, fds = self._chunks[0]
            try:
                sent = self._send(data, fds)
            except (BlockingIOError, InterruptedError):
                return False
            except OSError as error:
                if error.errno not in _TRY_LATER:
                    raise
                self.throttled = True
                return False
            if sent == len(data):
                self._chunks.popleft()
            else:
                self._chunks[0] = (data[sent:], ())
        return True

    def _send(self, data: memoryview, fds: Sequence[int]) -> int:
        if not fds:
            return self._sock.send(data)
        return self._sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])

    def drop(self) -> None:
        self._chunks.clear()


class Inbox:
    """Reassembles frames from a non-blocking socket: :meth:`receive` reads once, :meth:`take` returns what is complete.

    Attributes:
        ended: the stream is at its end, or broken: the peer has hung up.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.ended = False
        self._buffer = bytearray()
        # One entry per "F" byte, in the order of the stream; None: descriptors were lost on the way. The kernel ends a
        # read after each byte that carries descriptors, so that two batches are never mixed.
        self._batches: deque[list[int] | None] = deque()

    def receive(self) -> bool:
        """Read once; return whether there were bytes to read. Sets :attr:`ended` at the end of the stream."""
        try:
            data, ancillary, flags, _ = self._sock.recvmsg(_READ_BYTES, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return False
        except OSError:
            self.ended = True
            return False
        fds: list[int] = []
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                received = array.array("i")
                received.frombytes(content[: len(content) - len(content) % received.itemsize])
                fds.extend(received)
        if flags & socket.MSG_CTRUNC:
            # This process has no free descriptor (EMFILE, ENFILE), so the kernel dropped some. It does not say which: the
            # rest could be taken for the wrong tensors.
            close_fds(fds)
            self._batches.append(None)
        elif fds:
            self._batches.append(fds)
        self._buffer += data
        self.ended = not data
        return bool(data)

    def take(self) -> Frame | None:
        """The next complete frame, or None."""
        if len(self._buffer) < _HEADER.size:
            return None
        num_fds, nbytes = _HEADER.unpack_from(self._buffer)
        num_batches = -(-num_fds // _FDS_PER_BATCH)
        start = _HEADER.size + num_batches
        if len(self._buffer) < start + nbytes:
            return None
        payload = bytes(memoryview(self._buffer)[start : start + nbytes])
        del self._buffer[: start + nbytes]
        batches = [self._batches.popleft() for _ in range(num_batches)]
        fds = [fd for batch in batches if batch is not None for fd in batch]
        whole = len(fds) == num_fds
        if not whole:
            close_fds(fds)
        try:
            message: Message = pickle.loads(payload)
        except BaseException:
            close_fds(fds)
            raise
        return Frame(message, fds, whole)

    def drop(self) -> None:
        for batch in self._batches:
            close_fds(batch or [])
        self._batches.clear()
        self._buffer.clear()


class TrainerChannel:
    """The worker's end of its socket. It waits for tasks and for room to reply, and notices that the trainer is gone.

    Args:
        fd: the socket; closed with the process and not before, so that the trainer sees end-of-file only then.
        parent: a pidfd of the trainer; -1 if the trainer is gone already.
    """

    def __init__(self, fd: int, parent: int) -> None:
        self._sock = socket.socket(fileno=fd)
        self._sock.setblocking(False)
        self._parent = parent
        self._inbox = Inbox(self._sock)
        self._outbox = Outbox(self._sock)

    def receive(self) -> Frame | None:
        """Wait for the next frame. None: no more will come, because the trainer hung up, or is gone and all is read."""
        while (frame := self._inbox.take()) is None and not self._inbox.ended:
            # An orphan still reads what was sent to it: what is staged is written. Only then is there nothing to wait for.
            orphaned = self._parent < 0
            readable = self._wait(select.POLLIN, timeout_ms=0 if orphaned else None)
            if readable:
                self._inbox.receive()
            elif orphaned:
                return None
        return frame

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Return when the message is sent, or when nobody is left to read it."""
        self._outbox.put(message, fds)
        with suppress(ConnectionError):
            while not self._outbox.flush() and self._parent >= 0:
                if self._outbox.throttled:
                    self._wait(0, _THROTTLED_MS)
                else:
                    self._wait(select.POLLOUT, None)
        # An orphan may not get rid of its reply: a process that the trainer forked can hold the other end, and never reads.
        self._outbox.drop()

    def _wait(self, events: int, timeout_ms: int | None) -> bool:
        """Whether the socket is ready. Also returns, and notes it, when the trainer is gone."""
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
