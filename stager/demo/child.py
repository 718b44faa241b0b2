"""A child process of the demo: started, listened to, killed, and looked for after its death."""

from __future__ import annotations

import os
import secrets
import selectors
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import psutil
from typing_extensions import Self

import stager
from stager.demo.events import Event, decode_event
from stager.workers.errors import StagerError

SILENCE_SECS = 120.0  # a child that says nothing for so long is stuck, however slow the machine
EXIT_SECS = 60.0
RECHECK_SECS = 0.1
LOG_LINES_SHOWN = 20

_NONCE_VARIABLE = "DEMO_CHILD_NONCE"  # inherited by the child's workers, and theirs alone


class ChildError(StagerError, RuntimeError):
    """A child of the demo failed; the message ends with the last lines of its log."""


class Child:
    """``python -m MODULE ARGUMENTS --events-fd FD`` with its output in a log file.

    Used as a context manager: on the way out the child is dead, killed if need be.  Its workers are its own to stop;
    :meth:`workers_alive` finds them, by an environment variable that only they inherit, even when the child is gone.
    """

    def __init__(self, module: str, arguments: Sequence[str], log: Path) -> None:
        read_fd, write_fd = os.pipe()
        command = [sys.executable, "-m", module, *arguments, "--events-fd", str(write_fd)]
        self._start(command, child_environment(os.environ), read_fd, write_fd, log)

    def _start(
        self, command: Sequence[str], environment: Mapping[str, str], read_fd: int, write_fd: int, log: Path
    ) -> None:
        """Start the process, which inherits ``write_fd``; ``read_fd`` is kept until ``__exit__``."""
        self._log = log
        self._nonce = secrets.token_hex(8)
        self._pipe = read_fd
        try:
            with open(log, "wb") as output:
                self._process = subprocess.Popen(
                    command,
                    pass_fds=[write_fd],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env={**environment, _NONCE_VARIABLE: self._nonce},
                )
        except BaseException:
            os.close(read_fd)
            raise
        finally:
            os.close(write_fd)  # the child's copy is now the only one, so its death is end-of-file here

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()
        os.close(self._pipe)

    def events(self) -> Iterator[Event]:
        """Every event until the child's end, be it an exit or a kill.

        Raises:
            ChildError: the child said nothing for ``SILENCE_SECS``.
        """
        return map(decode_event, self.lines())

    def lines(self) -> Iterator[bytes]:
        """What :meth:`events` decodes."""
        pending = b""
        with selectors.DefaultSelector() as selector:
            selector.register(self._pipe, selectors.EVENT_READ)
            while True:
                if not selector.select(SILENCE_SECS):
                    raise ChildError(f"a child said nothing for {SILENCE_SECS:.0f} s{self._log_tail()}")
                chunk = os.read(self._pipe, 1 << 16)
                if not chunk:
                    return  # what is pending then is a line that the child's death cut short
                *lines, pending = (pending + chunk).split(b"\n")
                yield from lines

    def kill(self) -> None:
        """SIGKILL the child, and only it, and wait until it is dead.  Nothing happens if it is dead already."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()

    def wait(self) -> None:
        """Wait for the child's exit, after its last event.

        Raises:
            ChildError: it failed, or did not exit within ``EXIT_SECS``.
        """
        code = self.exit_code()
        if code != 0:
            raise ChildError(f"a child failed with exit code {code}{self._log_tail()}")

    def exit_code(self) -> int:
        """As :meth:`wait`, of a child that may have failed; negative: the signal that killed it.

        Raises:
            ChildError: it did not exit within ``EXIT_SECS``.
        """
        try:
            return self._process.wait(EXIT_SECS)
        except subprocess.TimeoutExpired:
            raise ChildError(f"a child did not exit within {EXIT_SECS:.0f} s{self._log_tail()}") from None

    def workers_alive(self) -> list[psutil.Process]:
        """The processes started by the child, or by those, that are alive now."""
        return [process for process in psutil.process_iter() if self._is_mine(process)]

    def _is_mine(self, process: psutil.Process) -> bool:
        try:
            mine = process.environ().get(_NONCE_VARIABLE) == self._nonce
            return mine and process.pid not in self._trainers() and process.status() != psutil.STATUS_ZOMBIE
        except (psutil.Error, OSError):
            return False  # it ended meanwhile, or belongs to another user

    def _trainers(self) -> set[int]:
        """The pids that are not workers'."""
        return {self._process.pid}

    def _log_tail(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join([f"; the end of {self._log}:", *lines[-LOG_LINES_SHOWN:]])


def wait_until_gone(child: Child, timeout_secs: float) -> tuple[float, list[int]]:
    """Wait until no worker of a dead child is alive.

    Returns:
        The seconds it took, and the pids of the workers alive at the end of ``timeout_secs`` (none: all are gone).
    """
    started = time.monotonic()
    deadline = started + timeout_secs
    while (alive := child.workers_alive()) and time.monotonic() < deadline:
        psutil.wait_procs(alive, timeout=RECHECK_SECS)  # no longer: a zombie that nobody reaps has ended too
    return time.monotonic() - started, [process.pid for process in alive]


def child_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment in which a child finds the same ``stager`` as this process, installed or in a source tree."""
    variables = dict(environment)
    root = str(Path(stager.__path__[0]).resolve().parent)
    if root not in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, [root, variables.get("PYTHONPATH")]))
    return variables
