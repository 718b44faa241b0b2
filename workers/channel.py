"""Frames with file descriptors over one Unix stream socket.

A frame is ``<II`` (number of descriptors, payload length in bytes), one byte per batch of descriptors with the batch
attached to it (``SCM_RIGHTS`` takes 253 at a time), then the payload, which is a pickled :data:`protocol.Message`.
The two classes do the framing only; who waits, and for how long, is the caller's business.
"""

from __future__ import annotations

import array
import pickle
import socket
import struct
from collections import deque
from collections.abc import Iterator

from workers.codec import close_fds
from workers.protocol import Message

_HEADER = struct.Struct("<II")
_FDS_PER_BATCH = 253  # SCM_MAX_FD of Linux
_READ_BYTES = 1 << 18
_ANCILLARY_BYTES = socket.CMSG_SPACE(_FDS_PER_BATCH * array.array("i").itemsize)


class Outbox:
    """Messages on their way out of a non-blocking socket. Not thread-safe: the owner holds its lock.

    It owns the descriptors given to :meth:`put` and closes them once they are sent or dropped.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._chunks: deque[tuple[memoryview, list[int]]] = deque()

    def __bool__(self) -> bool:
        return bool(self._chunks)

    def put(self, message: Message, fds: list[int]) -> None:
        payload = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        self._chunks.append((memoryview(_HEADER.pack(len(fds), len(payload))), []))
        for start in range(0, len(fds), _FDS_PER_BATCH):
            self._chunks.append((memoryview(b"F"), fds[start : start + _FDS_PER_BATCH]))
        self._chunks.append((memoryview(payload), []))

    def flush(self) -> bool:
        """Send what the socket takes now; True when nothing is left. Raises OSError when the peer is gone."""
        while self._chunks:
            data, fds = self._chunks[0]
            try:
                sent = socket.send_fds(self._sock, [data], fds) if fds else self._sock.send(data)
            except (BlockingIOError, InterruptedError):
                return False
            close_fds(fds)
            if sent == len(data):
                self._chunks.popleft()
            else:
                self._chunks[0] = (data[sent:], [])
        return True

    def drop(self) -> None:
        for _, fds in self._chunks:
            close_fds(fds)
        self._chunks.clear()


class Inbox:
    """Reassembles messages. ``receive`` reads once; ``messages`` yields what is complete."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = bytearray()
        self._fds: list[int] = []

    def receive(self) -> bool:
        """Read once. False at end of stream; raises BlockingIOError when a non-blocking socket has nothing."""
        data, ancillary, _, _ = self._sock.recvmsg(_READ_BYTES, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC)
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds = array.array("i")
                fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
                self._fds.extend(fds)
        self._buffer += data
        return bool(data)

    def messages(self) -> Iterator[tuple[Message, list[int]]]:
        while len(self._buffer) >= _HEADER.size:
            num_fds, nbytes = _HEADER.unpack_from(self._buffer)
            num_batches = -(-num_fds // _FDS_PER_BATCH)
            start = _HEADER.size + num_batches
            if len(self._buffer) < start + nbytes:
                return
            message: Message = pickle.loads(memoryview(self._buffer)[start : start + nbytes])
            del self._buffer[: start + nbytes]
            fds, self._fds = self._fds[:num_fds], self._fds[num_fds:]
            yield message, fds

    def drop(self) -> None:
        close_fds(self._fds)
        self._buffer.clear()
