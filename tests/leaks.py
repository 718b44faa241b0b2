"""What a process holds, before and after: to prove that a test leaves nothing.

Things end a moment after they are told to (a thread between its last instruction and its end, a process being reaped), so
the comparison is repeated until it holds or a deadline passes.
"""

from __future__ import annotations

import gc
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests import fork_server, prepared_workers, temporary

_PATIENCE_SECS = 10.0
_MARK = "STAGER_TEST_SESSION"  # inherited by everything this session starts
os.environ[_MARK] = secrets.token_hex(8)
# Threads and descriptors that libraries keep for the life of the process once they were used.
_KEPT_THREADS = ("pydev", "Dummy", "QueueFeederThread", "tqdm_monitor")


@dataclass(frozen=True)
class Snapshot:
    children: frozenset[int]
    threads: frozenset[str]
    fds: frozenset[tuple[str, str]]
    mappings: int
    shm: frozenset[str]
    temporary: frozenset[str]

    @staticmethod
    def take() -> Snapshot:
        return Snapshot(_children(), _threads(), _fds(), _slab_mappings(), _shm(), temporary.entries())

    def leaks(self, roots: list[Path]) -> list[str]:
        """What is there now and was not before; partial directories and lock holders under ``roots``."""
        return _in_the_end(lambda: [*self._compare(Snapshot.take()), *_partials(roots)])

    def _compare(self, now: Snapshot) -> list[str]:
        problems = [f"process {pid} {_command(pid)}" for pid in now.children - self.children]
        problems += [f"thread {name}" for name in now.threads - self.threads]
        problems += [f"descriptor {fd} -> {target}" for fd, target in now.fds - self.fds]
        problems += [f"/dev/shm/{name}" for name in now.shm - self.shm]
        problems += [f"temporary file {name}" for name in now.temporary - self.temporary]
        if now.mappings > self.mappings:
            problems.append(f"{now.mappings - self.mappings} slab mappings")
        return problems


def temporary_leaks() -> list[str]:
    """What is in the temporary directory, which was empty when the session began."""
    return _in_the_end(lambda: [f"temporary file {name}" for name in temporary.entries()])


def _in_the_end(find: Callable[[], list[str]]) -> list[str]:
    """The problems that ``find`` still finds when the deadline has passed."""
    deadline = time.monotonic() + _PATIENCE_SECS
    while True:
        problems = find()
        if not problems or time.monotonic() > deadline:
            return problems
        gc.collect()
        threading.Event().wait(0.02)


def _children() -> frozenset[int]:
    """Descendants, and workers of trainers that are gone (they belong to init then, but carry our mark)."""
    parents = _parents()
    mine, seen = set[int](), {os.getpid()}
    while seen:
        seen = {pid for pid, parent in parents.items() if parent in seen}
        mine |= seen
    marks = {pid: _is_marked(pid) for pid in parents.keys() - mine - {os.getpid()}}
    _strangers.update(pid for pid, mark in marks.items() if mark is False or _KERNEL in (pid, parents[pid]))
    kept = fork_server.server_pids() | prepared_workers.server_pids()
    return frozenset(mine | set(_workers_among(pid for pid in marks if marks[pid]))) - kept


def worker_processes() -> list[int]:
    """Every live stager worker that was started, however indirectly, by this test session."""
    return _workers_among(filter(_is_marked, _parents()))


_KERNEL = 2  # the parent of its threads, where they can be seen
_strangers: set[int] = set()
"""Live processes that neither descend from this one nor carry its mark, and so never will: each is looked at once."""


def _parents() -> dict[int, int]:
    """Every process of this machine that is no stranger, and its parent. Read twice for each test, hence without psutil."""
    pids = set(map(int, filter(str.isdigit, os.listdir("/proc"))))
    _strangers.intersection_update(pids)
    found = {}
    for pid in pids - _strangers:
        with suppress(OSError):  # it has ended meanwhile
            found[pid] = int(_read(f"/proc/{pid}/stat").rpartition(b") ")[2].split()[1])
    return found


def _is_marked(pid: int) -> bool | None:
    """Whether it has our mark in its environment. None: that cannot be read, or is empty, as in the middle of an exec."""
    mark = f"{_MARK}={os.environ[_MARK]}".encode()
    with suppress(OSError):  # it has ended meanwhile, or is another user's
        if environment := _read(f"/proc/{pid}/environ"):
            return mark in environment.split(b"\0")
    return None


def _workers_among(pids: Iterable[int]) -> list[int]:
    """Those that run a worker's main function. A zombie has no command line."""
    found = []
    for pid in pids:
        with suppress(OSError):  # it has ended meanwhile
            if b"stager.workers.pool.worker_main import main" in _read(f"/proc/{pid}/cmdline"):
                found.append(pid)
    return found


def _read(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.read()


def _command(pid: int) -> str:
    try:
        return " ".join(psutil.Process(pid).cmdline())[:120]
    except psutil.Error:
        return "(gone)"


def _threads() -> frozenset[str]:
    return frozenset(f"{t.name} {t.ident}" for t in threading.enumerate() if not t.name.startswith(_KEPT_THREADS))


def _fds() -> frozenset[tuple[str, str]]:
    result = set()
    kept = {str(fd) for fd in fork_server.server_descriptors() | prepared_workers.server_descriptors()}
    for name in set(os.listdir("/proc/self/fd")) - kept:
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # the descriptor of the listing itself
            continue
        if not target.startswith(("/dev/null", "/dev/urandom")):
            result.add((name, target))
    return frozenset(result)


def _slab_mappings() -> int:
    with open("/proc/self/maps") as maps:
        return sum("stager-slab" in line for line in maps)


def _shm() -> frozenset[str]:
    return frozenset(os.listdir("/dev/shm"))


def _partials(roots: list[Path]) -> list[str]:
    return [f"partial directory {path}" for root in roots for path in root.rglob("*.partial-*")]
