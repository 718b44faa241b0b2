"""Processes seen from outside: their state, what they wait for, and how to end them all."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress

import psutil

from stager.stress.forks import ForkServer

_DUMP_SECS = 2.0


class Patience:
    """A deadline that allows for load: if four processes compete for each core, four seconds count as one.

    Args:
        secs: the deadline on an idle machine.
    """

    def __init__(self, secs: float) -> None:
        self._left_secs = secs
        self._last = time.monotonic()
        self._cores = os.cpu_count() or 1

    @property
    def is_over(self) -> bool:
        """Whether the deadline has passed. Ask often: each call accounts for the time since the one before."""
        now = time.monotonic()
        self._left_secs -= (now - self._last) * min(1.0, self._cores / max(os.getloadavg()[0], 0.1))
        self._last = now
        return self._left_secs < 0


def state_of(pid: int) -> str:
    """The state of a process, by the kernel's letter: R, S, D, T (stopped), Z; "" if it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0].decode()
    except (OSError, IndexError):
        return ""


def send(pid: int, signal_number: int) -> bool:
    """Send a signal. False if the process is gone."""
    try:
        os.kill(pid, signal_number)
    except ProcessLookupError:
        return False
    return True


def wait_until_gone(server: ForkServer, timeout_secs: float) -> list[psutil.Process]:
    """Wait until no descendant of the server is alive; return those that are after ``timeout_secs``."""
    patience = Patience(timeout_secs)
    while (alive := server.alive()) and not patience.is_over:
        server.wait(alive[0].pid, 0.05)
    return alive


def dump_and_kill(processes: list[psutil.Process], path: str) -> None:
    """Write what each process is doing to ``path``, and the Python stacks of its threads to its log; then kill it.

    SIGABRT makes Python print the stacks (``PYTHONFAULTHANDLER`` is set for all of them).
    """
    with open(path, "a", encoding="utf-8") as file:
        for process in processes:
            file.write(_description(process) + "\n")
    for process in processes:
        send(process.pid, signal.SIGCONT)
        send(process.pid, signal.SIGABRT)
    psutil.wait_procs(processes, timeout=_DUMP_SECS)
    for process in processes:
        with suppress(psutil.Error):
            process.kill()


def _description(process: psutil.Process) -> str:
    lines = [f"pid {process.pid} state {state_of(process.pid)}"]
    with suppress(psutil.Error):
        lines.append("command " + " ".join(process.cmdline())[:300])
    for thread in _listed(f"/proc/{process.pid}/task"):
        base = f"/proc/{process.pid}/task/{thread}"
        facts = [_read(f"{base}/{name}") for name in ("comm", "wchan", "syscall")]
        lines.append(f"  thread {thread} " + " | ".join(facts))
    return "\n".join(lines)


def _listed(path: str) -> list[str]:
    try:
        return sorted(os.listdir(path))
    except OSError:
        return []


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return "?"
