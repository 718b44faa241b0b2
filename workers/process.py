"""One worker process: how it is started, watched and stopped.

Started with ``python -c`` and not through ``multiprocessing.spawn``, which would import the trainer's main module
again: that needs an ``if __name__ == "__main__"`` guard and does not work from ``python -c``, stdin or a notebook.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing import spawn

from workers.channel import Inbox, Outbox
from workers.errors import WorkerStartError
from workers.main import WorkerSettings

_BOOTSTRAP = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[3]); "
    "from workers.main import main; main(int(sys.argv[1]), sys.argv[2])"
)


class WorkerProcess:
    """A started process, its socket and its sentinel.

    Attributes:
        pid: process id.
        sock: this side of the socket pair, non-blocking.
        sentinel: a pidfd, readable once the process has ended.
    """

    def __init__(self, settings: WorkerSettings, env: Mapping[str, str], inherit_fds: tuple[int, ...] = ()) -> None:
        self.sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._popen = self._start(theirs, settings, env, inherit_fds)
        except OSError as error:
            self.sock.close()
            raise WorkerStartError(f"cannot start a worker process: {error}") from error
        finally:
            theirs.close()  # so that the worker's death is an end-of-file here
        self.sock.setblocking(False)
        self.pid = self._popen.pid
        self.sentinel = os.pidfd_open(self.pid)
        self.outbox = Outbox(self.sock)
        self.inbox = Inbox(self.sock)

    @staticmethod
    def _start(
        theirs: socket.socket, settings: WorkerSettings, env: Mapping[str, str], inherit_fds: tuple[int, ...]
    ) -> subprocess.Popen[bytes]:
        executable = os.fsdecode(spawn.get_executable() or sys.executable)
        path = [os.path.abspath(entry) for entry in sys.path]  # '' means the directory of today
        # stdout goes to stderr: the trainer's stdout is often a pipe with a format of its own.
        return subprocess.Popen(
            [
                executable,
                *_interpreter_flags(),
                "-c",
                _BOOTSTRAP,
                str(theirs.fileno()),
                settings.to_json(),
                json.dumps(path),
            ],
            stdin=subprocess.DEVNULL,
            stdout=_stderr_fd(),
            pass_fds=(theirs.fileno(), *inherit_fds),
            env={**os.environ, **env},
            start_new_session=True,  # Ctrl-C and a launcher's killpg are for the trainer; its workers drain first
        )

    @property
    def exitcode(self) -> int | None:
        return self._popen.poll()

    def terminate(self) -> None:
        with suppress(ProcessLookupError):
            self._popen.terminate()

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            self._popen.kill()

    def join(self, timeout: float | None) -> bool:
        """Wait for the process to end; False when it has not after ``timeout`` seconds."""
        try:
            self._popen.wait(timeout)
        except subprocess.TimeoutExpired:
            return False
        return True

    def release(self) -> None:
        """Close this side's descriptors. The process must have ended, or belong to another process."""
        self.outbox.drop()
        self.inbox.drop()
        self.sock.close()
        if self.sentinel >= 0:
            os.close(self.sentinel)
            self.sentinel = -1

    def abandon(self) -> None:
        """After fork(), in the child: give up the descriptors without touching the process, which is not ours."""
        self.release()
        self._popen.returncode = 0  # or Popen.__del__ warns about a process it thinks is still running


def _interpreter_flags() -> list[str]:
    """The interpreter options that change semantics (-O, -E, -I, -X utf8 ...), as multiprocessing passes them on."""
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    return flags


def _stderr_fd() -> int:
    try:
        return sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):  # a notebook's stderr is no file; nor is pytest's
        return 2
