"""The conductor's side of the fork server: start a process, learn of its end, list the living."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

import psutil
from typing_extensions import Self

from stager.demo.job import child_environment
from stager.workers.errors import StagerError

_START_SECS = 120.0
_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True, slots=True)
class Request:
    """Asks the fork server, in one JSON line, to fork a child that does ``job`` (``jobs.py``); its output goes to ``log``.

    The server answers with the pid of the child.
    """

    job: str
    log: str
    arguments: dict[str, Any]


class ForkServerError(StagerError, RuntimeError):
    """The fork server ended or did not answer: a bug, or the host has no memory left."""


class ForkServer:
    """The fork server, seen from the conductor.

    Args:
        faults: the directory of armed fault points, for every process of every episode.
        log: the server's own output.
    """

    def __init__(self, faults: str, log: str) -> None:
        self._sock, theirs = socket.socketpair()
        environment = child_environment(os.environ)
        environment |= dict.fromkeys(_ONE_THREAD, "1")
        environment |= {"STAGER_FAULTS": faults, "PYTHONFAULTHANDLER": "1"}
        self._pending = b""
        self._ended: dict[int, int] = {}
        self._started: list[int] = []
        self._ready = False
        with theirs, open(log, "ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "stager.stress.server", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the conductor
            )
        self._await(lambda: self._ready, _START_SECS, "start")

    @property
    def pid(self) -> int:
        """The pid of the server."""
        return self._process.pid

    def fork(self, job: str, log: str, arguments: dict[str, Any]) -> int:
        """Start a process that does ``job``, and return its pid.

        Raises:
            ForkServerError
        """
        request = Request(job, log, arguments)
        self._sock.sendall(json.dumps(asdict(request)).encode() + b"\n")
        self._await(lambda: bool(self._started), _START_SECS, f"fork for {job}")
        pid = self._started.pop()
        self._ended.pop(pid, None)  # of an earlier process with the same pid
        return pid

    def exitcode(self, pid: int) -> int | None:
        """The exit code of a process as in ``subprocess``; None if it is alive."""
        self._read(0)
        return self._ended.get(pid)

    def wait(self, pid: int, timeout_secs: float) -> int | None:
        """Wait at most ``timeout_secs`` for the exit code of a process; None if it is still alive."""
        deadline = time.monotonic() + timeout_secs
        while (code := self.exitcode(pid)) is None and time.monotonic() < deadline:
            self._read(10)
        return code

    def alive(self) -> list[psutil.Process]:
        """All living descendants of the server."""
        found = []
        with suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.pid).children(recursive=True):
                with suppress(psutil.Error):
                    if process.status() != psutil.STATUS_ZOMBIE:
                        found.append(process)
        return found

    def close(self) -> None:
        """End the server, which ends all that it has started."""
        self._sock.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _await(self, done: Any, timeout_secs: float, what: str) -> None:
        deadline = time.monotonic() + timeout_secs
        while not done():
            if time.monotonic() > deadline or self._process.poll() is not None:
                raise ForkServerError(f"the fork server did not {what} (exit code {self._process.poll()})")
            self._read(50)

    def _read(self, timeout_ms: int) -> None:
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        while poll.poll(timeout_ms):
            chunk = self._sock.recv(1 << 16)
            if not chunk:
                raise ForkServerError(f"the fork server is gone (exit code {self._process.wait()})")
            *lines, self._pending = (self._pending + chunk).split(b"\n")
            for line in lines:
                self._note(json.loads(line))
            timeout_ms = 0

    def _note(self, message: dict[str, int]) -> None:
        if "ready" in message:
            self._ready = True
        elif "started" in message:
            self._started.append(message["started"])
        else:
            self._ended[message["ended"]] = message["status"]
