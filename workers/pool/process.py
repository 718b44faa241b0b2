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
from contextlib import suppress
from multiprocessing import spawn

from stager.workers.errors import WorkerStartError
from stager.workers.pool.channel import Inbox, Outbox
from stager.workers.pool.codec import close_fds
from stager.workers.pool.heartbeat import Pulse, look_interval
from stager.workers.pool.options import PoolOptions, WorkerSettings

# ``sys`` is built in. Anything else could be a file of that name in the current directory, which ``python -c`` puts first
# on its path, so the path is set before the first real import.
_BOOTSTRAP = "import sys; sys.path[:] = {path!r}; from stager.workers.pool.worker_main import main; main(*sys.argv[1:])"

# A task that imports torch gets one intra-op thread: the workers together must not take the trainer's cores.
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class WorkerProcess:
    """A started process, its socket and its sentinel.

    Attributes:
        sock: this side of the socket pair, non-blocking.
        sentinel: a pidfd, readable once the process has ended; -1 after :meth:`release`.

    Raises:
        WorkerStartError: the operating system refused the process, or a descriptor for it.
    """

    def __init__(self, options: PoolOptions) -> None:
        self.sentinel = self._beats = -1
        try:
            self.sock, theirs = map(_socket_above_stdio, socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM))
            self.sock.setblocking(False)
            self.outbox, self.inbox = Outbox(self.sock), Inbox(self.sock)
            try:
                # The trainer closes its copy of the worker's end, so that the worker's death is an end-of-file here.
                with theirs:
                    self._beats = _above_stdio(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
                    self._popen = _start(theirs, self._beats, options)
                self.pid = self._popen.pid
                # At once, while the process was surely not reaped yet: the pid is still its own.
                self.sentinel = self._open_sentinel()
            except BaseException:
                self.release()
                raise
        except (OSError, ValueError) as error:  # ValueError: a NUL byte in an environment variable
            raise WorkerStartError(f"cannot start a worker process: {error}") from error
        self.pulse = Pulse(self.pid, self._beats)

    def _open_sentinel(self) -> int:
        try:
            return os.pidfd_open(self.pid)
        except OSError:
            # Out of descriptors. A process that the pool cannot watch must not be left.
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
        """Send SIGKILL."""
        # Through the pidfd: if a SIGCHLD handler of the user reaped the process, another one may have its pid.
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
        # Returns at once: the process has ended, and only has to be reaped.
        self._popen.wait()
        return True

    def release(self) -> None:
        """Close this side's descriptors. The process must have ended, or belong to another process. Idempotent."""
        self.outbox.drop()
        self.inbox.drop()
        self.sock.close()
        close_fds([self._beats, self.sentinel])
        self._beats = self.sentinel = -1

    def detach(self) -> None:
        """Let the process finish the tasks it was sent and end by itself; a thread waits to reap it."""
        self.release()
        threading.Thread(target=self._popen.wait, name="stager-reaper", daemon=True).start()

    def abandon(self) -> None:
        """After fork(), in the child: give up the descriptors without touching the process, which is not ours."""
        self.release()
        # Otherwise Popen.__del__ would warn about a process that it takes for running.
        self._popen.returncode = 0


def _start(theirs: socket.socket, beats: int, options: PoolOptions) -> subprocess.Popen[bytes]:
    executable = spawn.get_executable() or sys.executable
    if not executable:
        raise WorkerStartError(
            "this interpreter does not know the path of its own executable, perhaps because it is embedded; "
            "set it with multiprocessing.set_executable()"
        )
    settings = WorkerSettings(
        os.getpid(),
        options.nice,
        options.ionice,
        options.orphan_timeout_secs,
        look_interval(options.heartbeat_timeout_secs),
    )
    # Absolute, because '' and relative entries mean the directory at this moment.
    path = [os.path.abspath(os.fsdecode(entry)) for entry in sys.path]
    arguments = ["-c", _BOOTSTRAP.format(path=path), str(theirs.fileno()), str(beats), settings.to_json()]
    # Standard output goes there, too: the trainer's is often a pipe with a format of its own.
    output = _stderr_fd()
    return subprocess.Popen(
        [os.fsdecode(executable), *_interpreter_flags(), *arguments],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        pass_fds=(theirs.fileno(), beats),
        env={**os.environ, **_ONE_THREAD, **(options.env or {})},
        # Ctrl-C and a launcher's killpg are for the trainer. Its workers drain first.
        start_new_session=True,
    )


def _interpreter_flags() -> list[str]:
    """The interpreter options that change semantics (-O, -E, -I, -X utf8 ...), as multiprocessing passes them on."""
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # multiprocessing uses it too
    return flags


def _stderr_fd() -> int:
    """The descriptor of this process's standard error. Not simply 2: a daemon that closed 2 may have reused the number."""
    for stream in (sys.stderr, sys.__stderr__):
        try:
            fd = stream.fileno()  # type: ignore[union-attr]  # None in such a daemon
            os.fstat(fd)
        except (AttributeError, OSError, ValueError):  # a notebook's stderr is no file
            continue
        return fd
    return subprocess.DEVNULL


def _above_stdio(fd: int) -> int:
    """Duplicate a descriptor to a number above 2, and close it: a daemon may have closed its standard streams."""
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    finally:
        os.close(fd)


def _socket_above_stdio(sock: socket.socket) -> socket.socket:
    return sock if sock.fileno() > 2 else socket.socket(fileno=_above_stdio(sock.detach()))
