"""A fork server: a process that has imported torch and stager, has one thread, and forks every process of an episode.

      conductor                          fork server                       its children
    +---------------------+   JSON     +--------------------+   fork     +----------------------+
    |  ForkServer         |  lines     |  serve()           |  ------->  |  trainer | check |   |
    |   (forks.py)      --|==========>-|   reaps everybody  |            |  reference | hog ... |
    +---------------------+            +--------------------+            +----------------------+
                                          ^ orphans (workers of a trainer that is gone) are reparented to it

A trainer costs a fork instead of the seconds of ``import torch``. The child *returns* from ``serve()`` and ends as any
program does: exceptions, ``sys.exit``, atexit and Ctrl-C are the real ones. A Checkpointer is made in children only, and the
server never has a second thread, so that a fork never copies a lock that another thread holds.

The server is a subreaper: every process that an episode leaves behind is among its descendants.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import select
import signal
import socket
import sys
from contextlib import suppress

import psutil

from stager.stress.forks import Request

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_POLL_MS = 10
_libc = ctypes.CDLL(None, use_errno=True)


def main(fd: int) -> None:
    """Run the server, and in each of its children the job."""
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    from stager.stress.jobs import run_job  # imports torch and stager, before the first fork

    gc.collect()
    gc.freeze()
    request = serve(socket.socket(fileno=fd))
    if request is not None:
        run_job(request.job, request.arguments)


def serve(sock: socket.socket) -> Request | None:
    """Serve until the conductor hangs up, then return None. In a forked child, return its request at once."""
    sock.setblocking(True)
    _send(sock, {"ready": os.getpid()})
    pending = b""
    while True:
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        if poll.poll(_POLL_MS):
            chunk = sock.recv(1 << 16)
            if not chunk:
                _kill_all()
                return None
            *lines, pending = (pending + chunk).split(b"\n")
            for line in lines:
                request = Request(**json.loads(line))
                _check_single_threaded()
                pid = os.fork()
                if pid == 0:
                    _become_child(sock, request.log)
                    return request
                _send(sock, {"started": pid})
        _reap(sock)


def _reap(sock: socket.socket) -> None:
    """Reap the children that have ended, and orphans of theirs."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        _send(sock, {"ended": pid, "status": os.waitstatus_to_exitcode(status)})


def _become_child(sock: socket.socket, log: str) -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    sock.close()
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a server that a shell started in the background ignores it


def _check_single_threaded() -> None:
    threads = len(os.listdir("/proc/self/task"))
    if threads != 1:
        raise RuntimeError(f"the fork server has {threads} threads, so a child that it forks could hang")


def _kill_all() -> None:
    """Kill all descendants: the conductor is gone or done."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            process.kill()
    with suppress(ChildProcessError):
        while True:
            os.wait()


def _send(sock: socket.socket, message: dict[str, int]) -> None:
    with suppress(BrokenPipeError, ConnectionResetError):
        sock.sendall(json.dumps(message).encode() + b"\n")


if __name__ == "__main__":
    main(int(sys.argv[1]))
