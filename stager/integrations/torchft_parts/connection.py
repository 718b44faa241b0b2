"""A TCP connection between two processes that know one secret. To an ``Exchange`` it is a process group of two.

The greeting, before anything of a state travels:

1. sender to receiver: which protocol, and a random nonce
2. receiver to sender: its own nonce, the step it wants, how long it will wait; and the HMAC of all of it with the secret
3. sender to receiver: the HMAC of both nonces

So neither side can be imitated by a program that does not know the secret, or that has listened to earlier greetings. The
secret itself does not travel. From the nonces and the secret, both make the key that signs the header of the snapshot.
Nothing is encrypted.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import socket
import struct
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch

from stager.workers.errors import ReplicationError
from stager.workers.memory.pages import bytes_at

MAC_BYTES = 32
_PROTOCOL = b"stager-torchft-1"
_NONCE_BYTES = 32
_WISH = struct.Struct("<qd")
_ACCEPTED = b"\x01"
_LEAST_SECS = 0.001  # settimeout(0) would mean: do not wait at all


@dataclass(frozen=True, slots=True)
class Wish:
    """What a receiver asks for: a step, and for how long it will wait (seconds)."""

    step: int
    secs: float


class _Work:
    """What torch calls a Work: the bytes travel while somebody waits for them."""

    def __init__(self, transfer: Callable[[float], None]) -> None:
        self._transfer = transfer

    def wait(self, timeout: timedelta) -> bool:
        """Send or receive now.

        Raises:
            RuntimeError: the other side is gone, or the time is up.
        """
        try:
            self._transfer(time.monotonic() + timeout.total_seconds())
        except OSError as error:
            raise RuntimeError(str(error)) from error
        return True


class Connection:
    """One connection. Not thread-safe, except for :meth:`abort`.

    Attributes:
        key: signs the headers that travel here.
        peer: address of the other side.
    """

    def __init__(self, link: socket.socket) -> None:
        self._socket = link
        self.key = b""
        host, port = link.getpeername()[:2]
        self.peer = f"{host}:{port}"
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @staticmethod
    def open(host: str, port: int, secret: bytes, step: int, deadline: float) -> Connection:
        """Connect as a receiver, and greet.

        Args:
            deadline: by ``time.monotonic()``. The sender is told how much of it is left.

        Raises:
            ReplicationError: nobody is there, or it does not know the secret, or does not answer in time.
        """
        where = f"the sender at {host}:{port}"
        try:
            connection = Connection(socket.create_connection((host, port), timeout=_left(deadline)))
        except (OSError, UnicodeError) as error:  # of a host whose name can be none
            raise ReplicationError(f"{where} cannot be reached: {error}") from error
        try:
            connection._ask(secret, Wish(step, _left(deadline)), deadline)
        except (OSError, ReplicationError) as error:
            connection.close()
            raise ReplicationError(f"{where} refused, or did not answer in time: {error}") from error
        return connection

    def _ask(self, secret: bytes, wish: Wish, deadline: float) -> None:
        protocol = self._receive_bytes(len(_PROTOCOL), deadline)
        if protocol != _PROTOCOL:
            raise ReplicationError(f"it speaks another protocol ({protocol!r}); run one version of stager everywhere")
        theirs, own = self._receive_bytes(_NONCE_BYTES, deadline), secrets.token_bytes(_NONCE_BYTES)
        words = own + _WISH.pack(wish.step, wish.secs)
        self._send_bytes(words + _mac(secret, b"receiver", theirs + words), deadline)
        try:
            proof = self._receive_bytes(MAC_BYTES, deadline)
        except ConnectionError as error:
            raise ReplicationError(
                f"it ended the connection ({error}); probably it has another secret: give all replica groups the same"
            ) from error
        if not hmac.compare_digest(proof, _mac(secret, b"sender", theirs + own)):
            raise ReplicationError("it does not know the secret; give all replica groups the same")
        self.key = _mac(secret, b"header", theirs + own)

    def greet(self, secret: bytes, deadline: float) -> Wish:
        """Greet a receiver that has connected.

        Raises:
            ReplicationError: it does not know the secret.
            OSError: it is gone, or does not answer in time.
        """
        own = secrets.token_bytes(_NONCE_BYTES)
        self._send_bytes(_PROTOCOL + own, deadline)
        words = self._receive_bytes(_NONCE_BYTES + _WISH.size, deadline)
        proof = self._receive_bytes(MAC_BYTES, deadline)
        if not hmac.compare_digest(proof, _mac(secret, b"receiver", own + words)):
            raise ReplicationError(f"{self.peer} does not know the secret")
        nonces = own + words[:_NONCE_BYTES]
        self._send_bytes(_mac(secret, b"sender", nonces), deadline)
        self.key = _mac(secret, b"header", nonces)
        return Wish(*_WISH.unpack(words[_NONCE_BYTES:]))

    # -- as a process group of two

    def send(self, tensors: Sequence[torch.Tensor], rank: int, tag: int) -> _Work:
        """Send a uint8 or int64 CPU tensor when it is waited for."""
        return _Work(partial(self._send_tensor, tensors[0]))

    def recv(self, tensors: Sequence[torch.Tensor], rank: int, tag: int) -> _Work:
        """Receive into a CPU tensor when it is waited for."""
        return _Work(partial(self._receive_tensor, tensors[0]))

    def _send_tensor(self, tensor: torch.Tensor, deadline: float) -> None:
        self._send_bytes(bytes_at(tensor.data_ptr(), tensor.nbytes), deadline)

    def _receive_tensor(self, tensor: torch.Tensor, deadline: float) -> None:
        self._receive_into(bytes_at(tensor.data_ptr(), tensor.nbytes), deadline)

    # -- the end of a transfer

    def accept(self, deadline: float) -> None:
        """Tell the sender that all is there, and whole."""
        self._send_bytes(_ACCEPTED, deadline)

    def is_accepted(self, deadline: float) -> bool:
        """Wait for what the receiver says of it; it says nothing, but goes, if it refuses.

        Raises:
            OSError: the time is up.
        """
        try:
            return self._receive_bytes(1, deadline) == _ACCEPTED
        except ConnectionError:
            return False

    def abort(self) -> None:
        """End the connection under a thread that sends or receives, which then closes it."""
        with suppress(OSError):  # the other side was first
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End the connection. Idempotent."""
        self.abort()
        self._socket.close()

    # -- bytes

    def _send_bytes(self, data: Any, deadline: float) -> None:
        self._socket.settimeout(_left(deadline))
        self._socket.sendall(data)

    def _receive_bytes(self, nbytes: int, deadline: float) -> bytes:
        data = bytearray(nbytes)
        self._receive_into(memoryview(data), deadline)
        return bytes(data)

    def _receive_into(self, view: memoryview, deadline: float) -> None:
        while view.nbytes:
            self._socket.settimeout(_left(deadline))
            count = self._socket.recv_into(view)
            if not count:
                raise ConnectionResetError("the other side has ended the connection")
            view = view[count:]


def _left(deadline: float) -> float:
    """Seconds until a deadline; when it has passed, just enough to find that out."""
    return max(deadline - time.monotonic(), _LEAST_SECS)


def _mac(secret: bytes, who: bytes, data: bytes) -> bytes:
    return hmac.digest(secret, who + data, "sha256")


def sign(key: bytes, data: bytes) -> bytes:
    """Put the HMAC of some bytes before them."""
    return hmac.digest(key, data, hashlib.sha256) + data


def signed(key: bytes, data: bytes) -> bytes | None:
    """Return what :func:`sign` was given; None if the key or the bytes are others."""
    mac, content = data[:MAC_BYTES], data[MAC_BYTES:]
    return content if hmac.compare_digest(mac, hmac.digest(key, content, hashlib.sha256)) else None
