"""Trainers that start in no time: a prepared process, with torch imported and no thread started, forks each of them.

A trainer is a function of a module; when it returns or raises, its interpreter ends as that of any program would.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import TextIO

import psutil

_READY = "ready"


class Trainer:
    """One forked trainer.

    Attributes:
        pid: process id.
        stdout: what it says, line by line.
        stderr: the file with what it and its workers complain about.
    """

    def __init__(self, nursery: Nursery, pid: int, stdout: TextIO, stderr: Path) -> None:
        self._nursery = nursery
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
        return self._nursery.wait(self)

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.stdout.close()
        if kind is not None:
            self._nursery.end(self)


class Nursery:
    """The prepared process."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._num_trainers = 0
        self._ended: set[int] = set()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.nursery"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self._answer() == _READY

    def start(self, function: str, *arguments: object) -> Trainer:
        """Fork a trainer that runs ``module:function`` with these arguments, in today's environment."""
        self._num_trainers += 1
        fifo = self._directory / f"trainer-{self._num_trainers}.out"
        stderr = self._directory / f"trainer-{self._num_trainers}.err"
        os.mkfifo(fifo)
        self._ask(
            {"function": function, "arguments": arguments, "env": dict(os.environ), "output": [str(fifo), str(stderr)]}
        )
        stdout = fifo.open()  # until somebody has opened the other end
        fifo.unlink()
        return Trainer(self, int(self._answer()), stdout, stderr)

    def end(self, trainer: Trainer) -> None:
        """SIGKILL, unless it was waited for: then its pid may be somebody else's."""
        if trainer.pid not in self._ended:
            os.kill(trainer.pid, signal.SIGKILL)
            self.wait(trainer)

    def wait(self, trainer: Trainer) -> int:
        self._ended.add(trainer.pid)
        self._ask({"wait": trainer.pid})
        return int(self._answer())

    def _ask(self, request: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def __enter__(self) -> Nursery:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


# -- the prepared process -------------------------------------------------------------------------------------------


def serve() -> dict[str, object] | None:
    """Fork and wait as told. Returns in every child, with what it is to run, and at the end."""
    print(_READY, flush=True)
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        if "wait" in request:
            print(os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1]), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            return dict(request)
        print(pid, flush=True)
    return None


def become_trainer(request: dict[str, object]) -> None:
    stdout, stderr = request["output"]
    for path, number in ((stdout, 1), (stderr, 2)):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(fd, number)
        os.close(fd)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite that runs in the background has it ignored
    os.environ.clear()
    os.environ.update(request["env"])
    faults._DIRECTORY = os.environ.get("STAGER_FAULTS")
    module, _, name = str(request["function"]).partition(":")
    getattr(importlib.import_module(module), name)(*request["arguments"])


if __name__ == "__main__":
    import threading

    from stager.workers import faults

    import tests.crash.trainers  # noqa: F401  (with it comes torch, before anything is forked)

    assert threading.active_count() == 1
    if (request := serve()) is not None:
        become_trainer(request)
