"""One worker process: how it is started, watched and stopped.

Started with ``python -c`` and not through ``multiprocessing.spawn``, which would import the trainer's main module
again: that needs an ``if __name__ == "__main__"`` guard and does not work from ``python -c``, stdin or a notebook.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing import spawn

from stager.workers.errors import WorkerStartError
from stager.workers.pool.channel import Inbox, Outbox
from stager.workers.pool.heartbeat import Pulse
from stager.workers.pool.options import WorkerSettings

# ``sys`` is built in. Anything else could be a file of that name in the current directory, which ``python -c`` puts first
# on its path, so the path is set before the first real import.
_BOOTSTRAP = "import sys; sys.path[:] = {path!r}; from stager.workers.pool.worker_main import main; main(*sys.argv[1:])"


class WorkerProcess:
    """A started process, its socket and its sentinel.

    Attributes:
        pid: process id.
        sock: this side of the socket pair, non-blocking.
        sentinel: a pidfd, readable once the process has ended.
        pulse: its signs of life.

    Raises:
        WorkerStartError: the operating system refused the process, or a descriptor for it.
    """

    def __init__(self, settings: WorkerSettings, env: Mapping[str, str], inherit_fds: tuple[int, ...] = ()) -> None:
        try:
            self.sock, theirs = map(_above_stdio, socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM))
            self._beats = -1
            try:
                # The parent closes its copy of the other end, so that the worker's death is an end-of-file here.
                with theirs:
                    self._beats = _make_eventfd()
                    self._popen = _start(theirs, self._beats, settings, env, inherit_fds)
                self.pid = self._popen.pid
                self.sentinel = self._open_sentinel()
            except BaseException:
                self.sock.close()
                self._close_beats()
                raise
        except (OSError, ValueError) as error:  # ValueError: a NUL byte in an environment variable
            raise WorkerStartError(f"cannot start a worker process: {error}") from error
        self.sock.setblocking(False)
        self.outbox = Outbox(self.sock)
        self.inbox = Inbox(self.sock)
        self.pulse = Pulse(self.pid, self._beats)

    def _open_sentinel(self) -> int:
        try:
            return os.pidfd_open(self.pid)
        except OSError:  # EMFILE: a process that nobody could watch must not be left
            self._popen.kill()
            self._popen.wait()
            raise

    @property
    def exitcode(self) -> int | None:
        return self._popen.poll()

    def has_input(self) -> bool:
        """Whether something that the worker sent has not been read yet."""
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        return any(events & select.POLLIN for _, events in poll.poll(0))

    def kill(self) -> None:
        """SIGKILL. Through the pidfd: the pid may be somebody else's if a SIGCHLD handler has reaped the process."""
        if self.sentinel >= 0:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.sentinel, signal.SIGKILL)

    def join(self, timeout: float) -> bool:
        """Wait for the process to end; False when it has not after ``timeout`` seconds."""
        if self.sentinel < 0:
            return True
        poll = select.poll()
        poll.register(self.sentinel, select.POLLIN)
        if not poll.poll(timeout * 1000):
            return False
        self._popen.wait()  # at once: it only has to be reaped
        return True

    def release(self) -> None:
        """Close this side's descriptors. The process must have ended, or belong to another process. Idempotent."""
        self.outbox.drop()
        self.inbox.drop()
        self.sock.close()
        self._close_beats()
        if self.sentinel >= 0:
            os.close(self.sentinel)
            self.sentinel = -1

    def _close_beats(self) -> None:
        if self._beats >= 0:
            os.close(self._beats)
            self._beats = -1

    def detach(self) -> None:
        """Let the process finish the tasks it was sent and end by itself; a thread waits to reap it."""
        self.release()
        threading.Thread(target=self._popen.wait, name="stager-reaper", daemon=True).start()

    def abandon(self) -> None:
        """After fork(), in the child: give up the descriptors without touching the process, which is not ours."""
        self.release()
        self._popen.returncode = 0  # or Popen.__del__ warns about a process it thinks is still running


def _start(
    theirs: socket.socket, beats: int, settings: WorkerSettings, env: Mapping[str, str], inherit_fds: tuple[int, ...]
) -> subprocess.Popen[bytes]:
    executable = spawn.get_executable() or sys.executable
    if not executable:
        raise WorkerStartError(
            "this interpreter does not know its own executable (it is embedded?): "
            "name one with multiprocessing.set_executable()"
        )
    path = [os.path.abspath(os.fsdecode(entry)) for entry in sys.path]  # '' means the directory of today
    bootstrap = _BOOTSTRAP.format(path=path)
    output = _stderr_fd()  # stdout goes there, too: the trainer's stdout is often a pipe with a format of its own
    return subprocess.Popen(
        [
            os.fsdecode(executable),
            *_interpreter_flags(),
            "-c",
            bootstrap,
            str(theirs.fileno()),
            str(beats),
            settings.to_json(),
        ],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        pass_fds=(theirs.fileno(), beats, *inherit_fds),
        env={**os.environ, **env},
        start_new_session=True,  # Ctrl-C and a launcher's killpg are for the trainer; its workers drain first
    )


def _interpreter_flags() -> list[str]:
    """The interpreter options that change semantics (-O, -E, -I, -X utf8 ...), as multiprocessing passes them on."""
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # multiprocessing uses it too
    return flags


def _stderr_fd() -> int:
    """A descriptor for the workers' output: this process's standard error, wherever that goes.

    Not simply 2: in a daemon that has closed it, that is whatever was opened next.
    """
    for stream in (sys.stderr, sys.__stderr__):
        try:
            fd = stream.fileno()  # type: ignore[union-attr]  # None in such a daemon
            os.fstat(fd)
        except (AttributeError, OSError, ValueError):  # a notebook's stderr is no file
            continue
        return fd
    return subprocess.DEVNULL


def _make_eventfd() -> int:
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    finally:
        os.close(fd)


def _above_stdio(sock: socket.socket) -> socket.socket:
    """The same socket, not as a standard stream, should the daemon have closed those."""
    if sock.fileno() > 2:
        return sock
    with sock:
        return socket.socket(fileno=fcntl.fcntl(sock.fileno(), fcntl.F_DUPFD_CLOEXEC, 3))
