"""Trainers, each forked by the fork server, and what a test does with them while they run.

A trainer is a function of a module; when it returns or raises, its interpreter ends as that of any program would.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TextIO

import psutil

from tests.fork_server import ForkServer


class Trainer:
    """One forked trainer.

    Attributes:
        pid: process id.
        stdout: what it says, line by line.
        stderr: the file with what it and its workers complain about.
    """

    def __init__(self, server: ForkServer, pid: int, stdout: TextIO, stderr: Path) -> None:
        self._server = server
        self.pid = pid
        self.stdout = stdout
        self.stderr = stderr

    def read(self) -> str:
        """Its next line; "" when it has ended."""
        return self.stdout.readline().strip()

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def send_to_all(self, number: int) -> None:
        """Also to its workers, as a job manager does."""
        for process in [psutil.Process(self.pid), *psutil.Process(self.pid).children()]:
            process.send_signal(number)

    def wait(self) -> int:
        """Until it has ended; its exit code, negative for a signal."""
        return self._server.wait(self.pid)

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.stdout.close()
        if kind is not None:
            self._server.kill(self.pid)


class Nursery:
    """Where trainers start, and the directory of what they print."""

    def __init__(self, server: ForkServer, directory: Path) -> None:
        self._server = server
        self._directory = directory
        self._num_trainers = 0

    def start(self, function: str, *arguments: object) -> Trainer:
        """Fork a trainer that runs ``module:function`` with these arguments, in today's environment."""
        self._num_trainers += 1
        fifo = self._directory / f"trainer-{self._num_trainers}.out"
        stderr = self._directory / f"trainer-{self._num_trainers}.err"
        os.mkfifo(fifo)
        pid = self._server.start(function, arguments, stdout=fifo, stderr=stderr)
        stdout = fifo.open()  # until the trainer has opened the other end
        fifo.unlink()
        return Trainer(self._server, pid, stdout, stderr)
