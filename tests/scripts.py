"""Programs of tests, as ``python -W error -c`` would run them, in processes that start at once (:mod:`tests.fork_server`).

What a program defines belongs to ``__main__``. Tests about how an interpreter starts run a fresh one instead.
"""

from __future__ import annotations

import os
import sys
import tempfile
import types
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from tests import fork_server


@dataclass(frozen=True)
class Program:
    """One that runs.

    Attributes:
        pid: process id.
        stdout: what it and its children print, to the end.
    """

    pid: int
    stdout: TextIO

    def kill(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Until it has ended; its exit code, negative for a signal."""
        return fork_server.shared().wait(self.pid)


@dataclass(frozen=True)
class Ended:
    """One that has ended, and whose standard output nobody holds any more."""

    returncode: int
    stdout: str


@contextmanager
def running(source: str, *arguments: object, modules: Iterable[str] = ()) -> Iterator[Program]:
    """Run ``source`` with ``sys.argv[1:]`` as given. Whatever it printed to stderr is printed at the end.

    Args:
        modules: what the fork server imports first; later programs then have it, too.
    """
    server = fork_server.shared()
    with tempfile.TemporaryDirectory() as directory:
        stdout, stderr = Path(directory, "stdout"), Path(directory, "stderr")
        os.mkfifo(stdout)
        words = [source, *map(str, arguments)]
        pid = server.start(f"{__name__}:run_as_main", [words], stdout=stdout, stderr=stderr, modules=modules)
        try:
            with stdout.open() as output:
                yield Program(pid, output)
        finally:
            server.kill(pid)
            print(stderr.read_text(), end="", file=sys.stderr)


def run(source: str, *arguments: object, modules: Iterable[str] = ()) -> Ended:
    """Run ``source`` until it has ended and nobody holds its standard output."""
    with running(source, *arguments, modules=modules) as program:
        stdout = program.stdout.read()
        return Ended(program.wait(), stdout)


def run_as_main(words: list[str]) -> None:
    """In the process."""
    source, *arguments = words
    sys.argv = ["-c", *arguments]
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    warnings.simplefilter("error")
    exec(compile(source, "<string>", "exec"), main.__dict__)
