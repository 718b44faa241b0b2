"""Processes seen from outside: which are stopped, what they wait for, and how they are all ended."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress

import psutil

from stager.stress.forks import ForkServer

_DUMP_SECS = 2.0


class Patience:
    """A deadline that allows for other people's load: where four processes want each core, four seconds count as one.

    Args:
        secs: on a machine that has nothing else to do.
    """

    def __init__(self, secs: float) -> None:
        self._left_secs = secs
        self._last = time.monotonic()
        self._cores = os.cpu_count() or 1

    @property
    def is_over(self) -> bool:
        """To be asked often."""
        now = time.monotonic()
        self._left_secs -= (now - self._last) * min(1.0, self._cores / max(os.getloadavg()[0], 0.1))
        self._last = now
        return self._left_secs < 0


def state_of(pid: int) -> str:
    """The kernel's letter: R, S, D, T (stopped), Z; "" when it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0].decode()
    except (OSError, IndexError):
        return ""


def send(pid: int, signal_number: int) -> bool:
    """False: it is gone."""
    try:
        os.kill(pid, signal_number)
    except ProcessLookupError:
        return False
    return True


def wait_until_gone(server: ForkServer, timeout_secs: float) -> list[psutil.Process]:
    """Until nothing that the server's children started is alive; returns what is after ``timeout_secs``."""
    patience = Patience(timeout_secs)
    while (alive := server.alive()) and not patience.is_over:
        server.wait(alive[0].pid, 0.05)
    return alive


def dump_and_kill(processes: list[psutil.Process], path: str) -> None:
    """What each process is doing goes to ``path``, and the Python stacks of its threads to its log; then they are killed.

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
