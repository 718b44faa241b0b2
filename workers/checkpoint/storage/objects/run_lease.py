"""The lock of a run in an object store: a lease.

    <run>/.stager.lock    who has the run, and how often the lease was renewed

    take      Write the object with one's own nonce and the next token. Every write is conditional on the object that was
              read, so of several that try at once, one succeeds.
    renew     Every process of the run, trainer or worker, renews the lease while it has it: a third of its time after the
              last renewal, whoever did that one. Workers do so while they write.
    expire    Another run takes a lease that was not renewed for its whole time. It measures that with its own clock, from
              when it first saw the object as it is, so clocks of hosts need not agree. It waits for so long in any case,
              unless it sees that the lease is renewed.
    check     Some stores take a write whose condition does not hold, and say nothing. Who has just taken the lease tries it,
              with what is there anyway, and gives the lease back if the store is one of those.
    fence     A holder that was stopped for longer, and then goes on, finds another nonce before it commits
              (``check_holder``), and fails. The token, which only grows, says in logs and in the object which was later.

NOTE [ A holder on this host ]
After a SIGKILL nobody gives the lease back, and a restart would wait for it to expire. So each holder also has a socket in
the kernel's abstract namespace, with a name that follows from a number in the lease. Its descriptor travels with each write
task, as that of a ``flock`` does on a file system. A run that begins on the same host (the same boot, the same network
namespace) takes the lease at once when nobody has such a socket any more, and waits as long as somebody has.

A rank on another host notes in the lease that it is spread. Then no host alone can tell that nobody has it: only the rank
that has taken it gives it back, and after a SIGKILL it expires.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import secrets
import socket
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from stager.workers.checkpoint.storage.objects.client import Client, Version
from stager.workers.checkpoint.storage.run_lock import RunLock
from stager.workers.errors import DirectoryInUseError, StorageError
from stager.workers.long_wait import LongWait
from stager.workers.memory.descriptor import Descriptor

logger = logging.getLogger("stager")

LOCK_NAME = ".stager.lock"
LEASE_SECS = 30.0
UNKNOWN_SECS = 60.0  # for a lease that cannot be read
_POLL_SECS = 0.5
_JOIN_SECS = 5.0
_SLOTS = 64  # processes of one host that take the lock: the ranks of one job


@dataclass(frozen=True, slots=True)
class _LockRecord:
    """What the object says.

    Attributes:
        nonce: of the run that has the lease; "": it was given back.
        token: grows by one with each run that takes it.
        beat: grows by one with each renewal.
        secs: for how long it counts after a renewal.
        host, pid, boot, namespace: where the process is that took it.
        socket: number in the names of its holders' sockets.
        spread: ranks on other hosts have it, too.
    """

    nonce: str = ""
    token: int = 0
    beat: int = 0
    secs: float = LEASE_SECS
    host: str = ""
    pid: int = 0
    boot: str = ""
    namespace: int = 0
    socket: str = ""
    spread: bool = False

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self)).encode() + b"\n"

    @staticmethod
    def of(data: bytes) -> _LockRecord:
        """Parse the object. One that is damaged is held by nobody knows whom, and expires."""
        try:
            lease = _LockRecord(**json.loads(data))
        except (ValueError, TypeError):
            return _LockRecord(nonce="unknown", secs=UNKNOWN_SECS)
        types_fit = all(type(getattr(lease, field.name)) is type(field.default) for field in fields(lease))
        return lease if types_fit else _LockRecord(nonce="unknown", secs=UNKNOWN_SECS)


class LeaseLock(RunLock):
    """The lease, taken. One thread renews it, until it is closed, or until nobody in this process holds its descriptor."""

    def __init__(self, client: Client, key: str, nonce: str, held: socket.socket, *, joined: bool = False) -> None:
        self._joined = joined
        self.descriptor = Descriptor(held.detach())
        self._client = client
        self._key = key
        self._nonce = nonce
        self._ended = threading.Event()
        weakref.finalize(self.descriptor, self._ended.set).atexit = False
        self._thread = threading.Thread(
            target=_renew, args=(client, key, nonce, self._ended), name="stager-lease", daemon=True
        )
        self._thread.start()

    def share(self) -> None:
        """See :meth:`RunLock.share`. Everybody who knows the nonce has the lease."""

    def close(self) -> None:
        """See :meth:`RunLock.close`. Gives the lease back if nobody here has it any more; a spread one, if it took it."""
        self._ended.set()
        self._thread.join(_JOIN_SECS)
        self.descriptor.close()
        if self._nonce:
            with suppress(StorageError, FileNotFoundError):  # it expires
                found = self._client.get_version(self._key)
                lease = _LockRecord.of(found.data)
                is_last = not self._joined if lease.spread else not _is_alive_here(lease)
                if lease.nonce == self._nonce and is_last:
                    self._client.replace(self._key, replace(lease, nonce="").to_bytes(), found.version)

    def abandon(self) -> None:
        """See :meth:`RunLock.abandon`. The thread is not in the child."""
        self.descriptor.close()


def take_lease(client: Client, key: str, timeout: float, nonce: str, path: str) -> LeaseLock:
    """Take the lease for a run.

    Args:
        timeout: seconds.
        path: of the run, for messages.

    Raises:
        DirectoryInUseError: another run has it for longer.
        StorageError: also if the store takes a write whose condition does not hold.
    """
    deadline = time.monotonic() + timeout
    wait: LongWait | None = None
    watch = _Watch()
    while True:
        found = _read(client, key)
        lease = _record_of(found)
        watch.look(found)
        if watch.is_free(lease):
            taken = _taken(lease, nonce)
            held = _bind(taken, 0)
            assert held is not None  # nobody else has its number
            try:
                if _write(client, key, taken, found):
                    _check_conditions(client, key, taken, path)
                    return LeaseLock(client, key, nonce, held)
            except BaseException:
                held.close()
                raise
            held.close()
        elif time.monotonic() >= deadline and watch.is_alive(lease):
            _refuse(lease, timeout, path)
        holder = f"the run of process {lease.pid} on {lease.host}, or workers that it left, to let go of {path}"
        wait = wait or LongWait(holder, timeout)
        wait.tick()
        time.sleep(_POLL_SECS)


def join_lease(client: Client, key: str, timeout: float, nonce: str, path: str) -> LeaseLock:
    """Hold the lease that the run's first rank has taken. Arguments and errors: :func:`take_lease`."""
    while True:
        found = _read(client, key)
        lease = _record_of(found)
        if lease.nonce != nonce:
            _refuse(lease, timeout, path)
        if lease.spread or _is_of_this_host(lease):
            break
        client.replace(key, replace(lease, spread=True).to_bytes(), None if found is None else found.version)
    held = next((held for slot in range(1, _SLOTS) if (held := _bind(lease, slot)) is not None), None)
    if held is None:
        raise StorageError(errno.EMFILE, f"more than {_SLOTS} ranks of this host share the lock", path)
    return LeaseLock(client, key, nonce, held, joined=True)


def holder_of(client: Client, key: str) -> str:
    """Return the nonce of the run that has the lease; "": nobody has."""
    return _record_of(_read(client, key)).nonce


@contextmanager
def without_holder(client: Client, key: str, path: str) -> Iterator[None]:
    """Raise DirectoryInUseError if a run has the lease, without taking it."""
    watch = _Watch()
    while True:
        found = _read(client, key)
        lease = _record_of(found)
        watch.look(found)
        if watch.is_free(lease):
            break
        if watch.is_alive(lease):
            _refuse(lease, 0, path)
        time.sleep(_POLL_SECS)
    yield


@contextmanager
def renewing(client: Client, key: str, nonce: str) -> Iterator[None]:
    """Renew the lease while the block runs, if it is that of ``nonce``."""
    ended = threading.Event()
    thread = threading.Thread(target=_renew, args=(client, key, nonce, ended), name="stager-lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(_JOIN_SECS)  # it may wait for an answer that does not come


def _renew(client: Client, key: str, nonce: str, ended: threading.Event) -> None:
    """Renew the lease whenever nobody else of the run has for a third of its time."""
    known: Version | None = None
    is_late = False
    while not ended.wait(LEASE_SECS / 3):
        try:
            found = _read(client, key)
            if found is None:
                continue
            lease = _LockRecord.of(found.data)
            if lease.nonce != nonce:
                if lease.nonce:
                    logger.warning("%s: another run has taken the lock of this one", client.url(key))
                return
            if known is not None and found.version != known.version:  # somebody else has renewed it
                known = found
                continue
            client.replace(key, replace(lease, beat=lease.beat + 1).to_bytes(), found.version)
            known = _read(client, key)
            if is_late:
                logger.info("%s: the lock of this run is renewed again", client.url(key))
            is_late = False
        except StorageError as error:
            if not is_late:  # once, until the store is back
                logger.warning("the lock of this run was not renewed, and will be when the store is back: %s", error)
            is_late = True


def _check_conditions(client: Client, key: str, lease: _LockRecord, path: str) -> None:
    """Make sure, once, that the store refuses a write whose condition does not hold. ``lease``: what is there, one's own."""
    if client.is_conditional:
        return
    data = lease.to_bytes()
    takes_all = client.create(key, data)  # of a key that exists
    stale = _read(client, key)
    if stale is not None and not takes_all:
        newer = replace(lease, beat=lease.beat + 1).to_bytes()
        client.replace(key, newer, stale.version)
        takes_all = client.replace(key, newer, stale.version)
    if takes_all:
        client.put(key, replace(lease, nonce="").to_bytes())
        raise StorageError(
            errno.EOPNOTSUPP,
            "this store takes a write whose condition (If-None-Match, If-Match) does not hold, so that two runs could "
            "overwrite each other's checkpoints; use one that knows conditional writes, or a newer version of this one",
            path,
        )
    client.is_conditional = True


def _record_of(found: Version | None) -> _LockRecord:
    """Return what the object says; that nobody has the lease, if there is none."""
    return _LockRecord() if found is None else _LockRecord.of(found.data)


class _Watch:
    """Looks at a lease again and again: is it free, or is it seen that somebody has it?"""

    def __init__(self) -> None:
        self._seen: Version | None = None
        self._seen_at = 0.0
        self._num_changes = -1  # the first look is none

    def look(self, found: Version | None) -> None:
        """Take note of the lease as it is now."""
        if self._num_changes < 0 or (found and found.version) != (self._seen and self._seen.version):
            self._seen, self._seen_at = found, time.monotonic()
            self._num_changes += 1

    def is_free(self, lease: _LockRecord) -> bool:
        """Return whether nobody has it: it was given back, or has expired, or its holders on this host are gone."""
        if not lease.nonce or (not lease.spread and _is_of_this_host(lease) and not _is_alive_here(lease)):
            return True
        return time.monotonic() - self._seen_at >= lease.secs and not _is_alive_here(lease)

    def is_alive(self, lease: _LockRecord) -> bool:
        """Return whether somebody is seen to have it: here, or it was renewed."""
        return self._num_changes > 0 or _is_alive_here(lease)


def _read(client: Client, key: str) -> Version | None:
    try:
        return client.get_version(key)
    except FileNotFoundError:
        return None


def _write(client: Client, key: str, lease: _LockRecord, found: Version | None) -> bool:
    data = lease.to_bytes()
    done = client.create(key, data) if found is None else client.replace(key, data, found.version)
    # An answer may be lost, and the client then repeats the request, which is refused: it is ours all the same.
    return done or _read_bytes(client, key) == data


def _read_bytes(client: Client, key: str) -> bytes | None:
    found = _read(client, key)
    return None if found is None else found.data


def _taken(lease: _LockRecord, nonce: str) -> _LockRecord:
    return _LockRecord(
        nonce=nonce,
        token=lease.token + 1,
        host=socket.gethostname(),
        pid=os.getpid(),
        boot=_boot(),
        namespace=_namespace(),
        socket=secrets.token_hex(8),
    )


def _refuse(lease: _LockRecord, timeout: float, path: str) -> Any:
    waited = f" after {timeout:g} s" if timeout else ""
    raise DirectoryInUseError(
        errno.EWOULDBLOCK,
        f"another run (process {lease.pid} on {lease.host or 'an unknown host'}, or workers that it left) still writes "
        f"checkpoints here{waited}; wait for it, or stop it. A Checkpointer can use another directory, or open this one "
        "with read_only=True",
        path,
    )


# -- NOTE [ A holder on this host ]


def _is_of_this_host(lease: _LockRecord) -> bool:
    return (lease.boot, lease.namespace) == (_boot(), _namespace())


def _is_alive_here(lease: _LockRecord) -> bool:
    """Return whether any process of this host holds the lock.

    It connects, and binds nothing: of two ranks that let go at once, each would take the other's look for a holder.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as looking:
        for slot in range(_SLOTS):
            with suppress(ConnectionRefusedError):
                looking.connect(_address(lease, slot))
                return True
    return False


def _address(lease: _LockRecord, slot: int) -> str:
    return f"\0stager-lease-{lease.socket}-{slot}"


def _bind(lease: _LockRecord, slot: int) -> socket.socket | None:
    """Return a socket that shows that this process holds the lock; None: another process has this one."""
    held = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        held.bind(_address(lease, slot))
    except OSError as error:
        held.close()
        if error.errno != errno.EADDRINUSE:
            raise
        return None
    return held


def _boot() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return ""


def _namespace() -> int:
    try:
        return os.stat("/proc/self/ns/net").st_ino
    except OSError:
        return 0
