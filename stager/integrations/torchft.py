"""torchft: a transport that snapshots the state of a healthy replica group once, and sends it while training goes on.

NOTE [ Who does what when a replica group recovers ]
    healthy replica: torchft's quorum thread        threads of the transport         recovering replica: quorum thread
    send_checkpoint(): snapshot, offer it   ---->   listen: accept, greet   <----    recv_checkpoint(): connect, greet
    disallow_checkpoint(): does not wait            hash the snapshot, send ---->    receive, compare hashes
    training goes on, and may change the state      give its memory back    <----    accept; fill tensors
  1. Metadata must be known before the step is: torchft reads it at each quorum. It is the address, and the secret unless the
     user has given one.
  2. Either side may come first. A receiver that comes first waits until its step is offered, or its time is up.
  3. There is one snapshot at a time. The next send_checkpoint() ends what is still being sent of the one before: torchft has
     gone on to another step by then, and a replica that is still behind asks for that one.
  4. A snapshot stays until all receivers of send_checkpoint() have accepted it, or until the next send_checkpoint(). When
     its timeout has passed, the next disallow_checkpoint() drops it: torchft calls that at each step. A step that is tried
     again is staged again.
  5. What goes wrong with a receiver is logged here and raised there. Nothing of it reaches the training of the sender.
     torchft notes an error of recv_checkpoint(), does not commit the step, and asks again at the next quorum.
"""

from __future__ import annotations

import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch
from torchft.checkpointing.transport import CheckpointTransport

from stager.config.host import available_memory_bytes
from stager.integrations.torchft_parts.connection import Connection, Wish, sign
from stager.integrations.torchft_parts.restoring import Restoring, fill
from stager.integrations.torchft_parts.snapshot import Snapshot, Stager
from stager.replication.exchange import Exchange, Peer
from stager.replication.parcel import Parcel
from stager.torch_api.staging.state_dict_stager import storages_of
from stager.workers.errors import ArgumentError, ClosedError, MemoryBudgetError, ReplicationError

logger = logging.getLogger("stager")

_SCHEME = "stager"
_GREETING_SECS = 10.0
_MAX_CONNECTIONS = 128  # at a time; a torchft quorum has fewer replicas that recover from one
_ABORT_SECS = 1.0  # an aborted transfer ends at once. One that hashes does not, and then other memory is taken
_JOIN_SECS = 5.0
_CPU = torch.device("cpu")
_NO_PARCEL = Parcel(b"", ())


class _Offer:
    """What send_checkpoint() offers. The transport's lock guards it.

    Attributes:
        step: of the snapshot.
        secs: for how long each transfer may take.
        until: when its receivers have given up, by ``time.monotonic()``.
        content: the snapshot, or why there is none; None: its memory was given back.
        is_open: whether another receiver may begin. Those that have begun go on.
        connections: to receivers that have begun.
    """

    def __init__(self, step: int, content: Snapshot | ReplicationError, num_receivers: int, secs: float) -> None:
        self.step = step
        self.secs = secs
        self.until = time.monotonic() + secs
        self.content: Snapshot | ReplicationError | None = content
        self.is_open = True
        self.connections: set[Connection] = set()
        self._num_missing = num_receivers

    def close(self) -> None:
        """Let nobody begin any more."""
        self.is_open = False
        self._drop_if_done()

    def leave(self, connection: Connection, *, has_accepted: bool) -> None:
        """Note that a transfer has ended."""
        self.connections.discard(connection)
        self._num_missing -= has_accepted
        if self._num_missing <= 0:
            self.is_open = False
        self._drop_if_done()

    def abort(self) -> None:
        """End the transfers."""
        self.close()
        for connection in self.connections:
            connection.abort()

    def _drop_if_done(self) -> None:
        if not self.is_open and not self.connections:
            self.content = None


class StagerTransport(CheckpointTransport[Any]):
    """Moves the state of a healthy replica group to those that recover, from a snapshot in shared memory.

    Give one to each ``torchft.Manager`` as ``checkpoint_transport``, on all ranks of all replica groups.

    Args:
        host: name or address by which the other replica groups reach this host. Default: its name.
        port: on which to listen, on all interfaces; 0: one that is free.
        secret: what all replica groups know, of 16 characters or more. Default: each transport makes its own, which travels
            with the metadata through torchft's manager, and stands in torchft's log.
        state_dict: returns tensors to receive into, nested as ``Manager`` nests them: ``{"user": {key: ...}}``. They are
            filled when all has arrived and every hash fits. Without it, new tensors in host memory are made.
        allow_pickle: whether a received state may hold objects of any class, whose code is then run. Otherwise it may hold
            tensors and plain data: what ``stager.Checkpointer.load`` allows.
        safe_globals: classes to allow beside these, by their full names.

    Raises:
        ArgumentError: ``secret`` is too short.
        OSError: the port cannot be listened to.
    """

    def __init__(
        self,
        *,
        host: str | None = None,
        port: int = 0,
        secret: str | None = None,
        state_dict: Callable[[], Any] | None = None,
        allow_pickle: bool = False,
        safe_globals: Sequence[str] = (),
    ) -> None:
        if secret is not None and len(secret) < 16:
            raise ArgumentError(
                f"secret has {len(secret)} characters, and must have 16 or more; make one with secrets.token_hex(16)"
            )
        self._given_secret = secret
        self._own_secret = secrets.token_hex(16)
        self._target = state_dict
        self._allow_pickle = allow_pickle
        self._safe_globals = tuple(safe_globals)
        self._stager = Stager()
        self._kept_bytes = 0  # of its memory, which is kept for the next snapshot
        self._listener = _listen(port)
        self._address = f"{_bracketed(host or socket.gethostname())}:{self._listener.getsockname()[1]}"
        self._changed = threading.Condition()  # guards what follows
        self._offer: _Offer | None = None
        self._connections: dict[Connection, threading.Thread] = {}
        self._closed = False
        self._thread = threading.Thread(target=self._accept_all, name="stager-torchft", daemon=True)
        self._thread.start()

    # -- what torchft calls

    def metadata(self) -> str:
        """Return where this transport is reached, and its secret unless one was given: the same at each step."""
        path = "" if self._given_secret is not None else f"/{self._own_secret}"
        return f"{_SCHEME}://{self._address}{path}"

    def send_checkpoint(self, dst_ranks: list[int], step: int, state_dict: Any, timeout: timedelta) -> None:
        """Take a snapshot and offer it. When this returns, the state may be changed.

        Args:
            dst_ranks: how many are there will receive it.
            step: of the state.
            state_dict: what to send.
            timeout: how long it is offered, and how long the transfer to each receiver may take.

        Raises:
            UnstageableError: something in the state cannot be copied or pickled; receivers are told.
            MemoryBudgetError: this host has no memory for the snapshot; receivers are told.
            ClosedError: after shutdown().
        """
        self._end_offer()  # so that its memory is free for this one
        secs = timeout.total_seconds()
        try:
            self._check_memory(state_dict)
            snapshot = Snapshot.take(self._stager, step, state_dict)
        except Exception as error:
            self._begin_offer(_Offer(step, _failed(step, error), len(dst_ranks), secs))
            raise
        self._begin_offer(_Offer(step, snapshot, len(dst_ranks), secs))

    def disallow_checkpoint(self) -> None:
        """Wait for nobody: what is sent is a snapshot. Drops it if all that were to receive it have given up by now."""
        with self._changed:
            if self._offer is not None and time.monotonic() > self._offer.until:
                self._offer.close()

    def recv_checkpoint(self, src_rank: int, metadata: str, step: int, timeout: timedelta) -> Any:
        """Receive a state. It is whole, or this raises and nothing was changed.

        Args:
            src_rank: replica rank of the sender, for messages.
            metadata: of the sender's transport.
            step: to receive.
            timeout: for all of it.

        Returns:
            The state. Its tensors are those of ``state_dict=`` where there is one of the same key path; the others lie in
            host memory.

        Raises:
            ReplicationError: the sender died, or does not answer in time, or does not know the secret, or has no snapshot of
                this step; or what arrived is not what was sent.
            UnsafePickleError: the state holds an object that could run code.
            StateMismatchError: it does not fit into ``state_dict=``.
        """
        deadline = time.monotonic() + timeout.total_seconds()
        host, port, secret = self._parse(metadata)
        connection = Connection.open(host, port, secret, step, deadline)
        receiver = Restoring(connection.key, step, self._allow_pickle, self._safe_globals)
        try:
            peer = Peer(connection, 0, src_rank, f"replica {src_rank} at {connection.peer}")
            exchange = Exchange(_CPU, timedelta(seconds=max(deadline - time.monotonic(), 0)))
            result = exchange.run(_NO_PARCEL, None, peer, receiver)
            if result.not_received is not None:
                raise result.not_received
            with suppress(OSError):  # the sender keeps its snapshot a little longer, then
                connection.accept(deadline)
        finally:
            connection.close()
            receiver.forget()  # torchft keeps an error, and with it what its traceback leads to
        if self._target is not None:
            fill(result.received, self._target())
        return result.received

    def shutdown(self, wait: bool = True) -> None:
        """Stop listening, end every transfer, and give the memory back. Idempotent.

        Args:
            wait: for the threads, which end soon.
        """
        with self._changed:
            self._closed = True
            for connection in self._connections:
                connection.abort()
            threads = [self._thread, *self._connections.values()]
            self._changed.notify_all()
        self._end_offer()
        with suppress(OSError):  # it was shut down before
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        if wait:
            for thread in threads:
                thread.join(_JOIN_SECS)
        self._stager.memory.close()

    def _check_memory(self, state: Any) -> None:
        """Refuse a state for which there is no memory: a page fault in shared memory would otherwise end the process."""
        nbytes = sum({storage._cdata: storage.nbytes() for storage in storages_of(state)}.values())
        missing, available = nbytes - self._kept_bytes, available_memory_bytes()
        if missing > available:
            raise MemoryBudgetError(
                f"the snapshot for a replica that recovers needs {missing:,} more bytes of memory, and this host has "
                f"{available:,}; give it more memory, or use torchft's HTTPTransport, which copies nothing in host memory"
            )
        self._kept_bytes = max(self._kept_bytes, nbytes)

    # -- the offer

    def _begin_offer(self, offer: _Offer) -> None:
        with self._changed:
            if self._closed:
                raise ClosedError("send_checkpoint() was called after shutdown(); make a new StagerTransport")
            self._offer = offer
            self._changed.notify_all()

    def _end_offer(self) -> None:
        """Drop the offer, and end the transfers of it."""
        with self._changed:
            offer, self._offer = self._offer, None
            if offer is not None:
                offer.abort()
                self._changed.wait_for(lambda: not offer.connections, _ABORT_SECS)

    # -- one receiver

    def _accept_all(self) -> None:
        with self._listener:
            while True:
                try:
                    link, _ = self._listener.accept()
                except OSError:  # shut down
                    return
                try:
                    self._start_to_serve(Connection(link))
                except (OSError, RuntimeError) as error:  # it is gone already; or there are too many threads
                    link.close()
                    if not self._closed:
                        logger.warning("a replica that recovers is not served: %s", str(error))

    def _start_to_serve(self, connection: Connection) -> None:
        with self._changed:
            if self._closed or len(self._connections) >= _MAX_CONNECTIONS:
                raise ConnectionRefusedError(f"{connection.peer} is one of more than {_MAX_CONNECTIONS} at a time")
            thread = threading.Thread(target=self._serve, args=(connection,), name="stager-torchft-send", daemon=True)
            thread.start()  # it cannot leave the dict before it is in it: that takes the lock
            self._connections[connection] = thread

    def _serve(self, connection: Connection) -> None:
        offer: _Offer | None = None
        has_accepted = False
        try:
            wish = connection.greet(self._secret, time.monotonic() + _GREETING_SECS)
            found = self._await_offer(connection, wish)
            if isinstance(found, _Offer):
                offer = found
                self._send(connection, offer)
                has_accepted = True
            else:
                Exchange(_CPU, timedelta(seconds=_GREETING_SECS)).run(found, _peer(connection), None, None)
        except (OSError, ReplicationError) as error:
            if not self._closed:
                logger.warning(
                    "a replica that recovers, at %s, did not receive its state: %s", connection.peer, str(error)
                )
        except Exception:
            logger.exception("a replica that recovers, at %s, did not receive its state", connection.peer)
        finally:
            with self._changed:
                del self._connections[connection]
                if offer is not None:
                    offer.leave(connection, has_accepted=has_accepted)
                    self._changed.notify_all()
            connection.close()  # here, where nobody else can abort it any more: its number may be given to another file

    def _await_offer(self, connection: Connection, wish: Wish) -> _Offer | ReplicationError:
        """Wait until a step is offered. Returns the offer, or why there is none."""

        def is_decided() -> bool:
            offer = self._offer
            if offer is None:
                return self._closed
            return self._closed or offer.step > wish.step or (offer.step == wish.step and offer.is_open)

        with self._changed:
            came = self._changed.wait_for(is_decided, wish.secs)
            offer = self._offer
            if self._closed:
                return ReplicationError("it has shut down")
            if not came or offer is None:
                return ReplicationError(f"timed out: step {wish.step} was not offered within {wish.secs:g} s")
            if offer.step != wish.step:
                return ReplicationError(f"step {wish.step} is past, and step {offer.step} is offered now")
            offer.connections.add(connection)
            return offer

    def _send(self, connection: Connection, offer: _Offer) -> None:
        """Send what is offered; return when the receiver has accepted it.

        Raises:
            ReplicationError: it has not, or there is no snapshot.
            OSError: the time is up.
        """
        began = time.monotonic()
        exchange = Exchange(_CPU, timedelta(seconds=offer.secs))
        content = offer.content
        if not isinstance(content, Snapshot):
            why = content or ReplicationError("its snapshot was dropped")
            exchange.run(why, _peer(connection), None, None)
            raise why
        parcel = content.parcel(sign(connection.key, content.header))
        failure = exchange.run(parcel, _peer(connection), None, None).not_sent
        if failure is not None:
            _cut_cycle(failure)
            raise ReplicationError(failure.message)
        if not connection.is_accepted(began + offer.secs):
            raise ReplicationError(f"it has not accepted step {offer.step}; its own log says why")
        told = "step %d, %d bytes, was sent to a replica that recovers, at %s, in %.3f s"
        logger.info(told, offer.step, content.nbytes, connection.peer, time.monotonic() - began)

    # -- addresses

    @property
    def _secret(self) -> bytes:
        return (self._given_secret or self._own_secret).encode()

    def _parse(self, metadata: str) -> tuple[str, int, bytes]:
        """Return host, port and secret of a sender."""
        problem: ValueError | None = None
        host = port = None
        try:
            parts = urlsplit(metadata)
            host, port = parts.hostname, parts.port
        except ValueError as error:  # a port above 65535, or a bracket without the other one
            problem = error
        if problem is not None or parts.scheme != _SCHEME or host is None or not port:
            raise ReplicationError(
                f"the sender's metadata is {metadata!r}, which is not of a StagerTransport"
                f"{'' if problem is None else f' ({problem})'}; give all replica groups one"
            ) from problem
        theirs = parts.path.removeprefix("/")
        if bool(theirs) == (self._given_secret is not None):
            has, lacks = (
                ("this replica", "the sender") if self._given_secret is not None else ("the sender", "this replica")
            )
            raise ReplicationError(
                f"{has} was given a secret, and {lacks} was not; give all replica groups the same, or none"
            )
        return host, port, theirs.encode() or self._secret


def _cut_cycle(error: BaseException | None) -> None:
    """Take the tracebacks off an error. Their frames refer to it, and would keep the snapshot until garbage is collected."""
    while error is not None:
        error.__traceback__, error = None, error.__cause__


def _peer(connection: Connection) -> Peer:
    return Peer(connection, 1, -1, connection.peer)


def _listen(port: int) -> socket.socket:
    """Listen on all interfaces, by IPv6 and IPv4 if this host has both."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _failed(step: int, error: Exception) -> ReplicationError:
    return ReplicationError(f"the snapshot of step {step} could not be taken: {type(error).__name__}: {error}")
