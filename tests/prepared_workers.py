"""Stands in for :mod:`subprocess` in :mod:`stager.workers.pool.process`: a prepared process forks each pool worker.

    monkeypatch.setattr(process, "subprocess", prepared_workers)

A fresh interpreter works 0.2 s until it serves, 3 s where its task needs torch, and the suite starts two thousand workers.
The server has imported what a worker needs, and has no second thread. A worker that it forks is a child of the process that
asked, runs the bootstrap of its command line, and has the descriptors, environment, directory and session that
:class:`subprocess.Popen` would have given it. Only the interpreter's start is left out. ``tests/pool``, and every program
that a test starts in an interpreter of its own, start workers afresh.

1. The first worker that is started starts the server (:func:`_server`). A program that :mod:`tests.fork_server` forks has
   forked a server of its own before anything else (:func:`nest`).
2. Each request holds the command, the environment, and by ``SCM_RIGHTS`` the descriptors.
3. The server clones itself with ``CLONE_PARENT``, so that the pool can wait for the worker, and the worker sees its trainer
   die.
4. The server ends when its socket is closed (:func:`stop`, or the end of pytest).
"""

from __future__ import annotations

import ctypes
import fcntl
import importlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from subprocess import DEVNULL, _args_from_interpreter_flags  # type: ignore[attr-defined]  # what process.py uses of it
from typing import Any, NoReturn

import psutil

__all__ = ["DEVNULL", "Popen", "_args_from_interpreter_flags"]

FRESH = "STAGER_TEST_FRESH_WORKERS"  # in the environment of a program: it starts them afresh, too
_ROOT = Path(__file__).resolve().parents[1]
_COMMAND = "from tests.prepared_workers import serve; serve()" + " " * 200  # room for a worker's: see _set_command_line
PRELOADED = (
    "torch",  # for deep copies
    "stager.workers.pool.worker_main",
    "stager.workers.pool.worker_loop",
    "stager.workers.checkpoint.write.write_task",
    "stager.workers.staged_copy.share",
)
_READY = b"ready"
_LARGEST_REQUEST = 1 << 17
_MOST_DESCRIPTORS = 64
_SYS_CLONE = {"x86_64": 56, "aarch64": 220}
_CLONE_PARENT = 0x8000  # linux/sched.h
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


class Popen:
    """A pool worker, with what :mod:`stager.workers.pool.process` uses of :class:`subprocess.Popen`.

    Args:
        arguments: the interpreter, its flags, ``-c``, the bootstrap and its arguments.
        pass_fds: descriptors that the worker has under the same numbers.
    """

    returncode: int | None

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        stdin: int,
        stdout: int,
        stderr: int,
        pass_fds: Sequence[int],
        env: Mapping[str, str],
        start_new_session: bool,
    ) -> None:
        assert (stdin, stdout, start_new_session) == (DEVNULL, stderr, True)
        command = list(arguments[arguments.index("-c") + 1 :])
        self.returncode = None
        self._lock = threading.Lock()
        with open(os.devnull, "w") as null:
            output = null.fileno() if stdout == DEVNULL else stdout
            request = {
                "command": command,
                "environment": dict(env),
                "directory": os.getcwd(),
                "numbers": [*pass_fds],
                "inherited": _inherited(),
            }
            self.pid = _server().start(request, [output, *pass_fds])

    def poll(self) -> int | None:
        return self._wait(os.WNOHANG)

    def wait(self) -> int | None:
        if self.returncode is None:
            # Not in waitpid with the lock held: poll() has to answer meanwhile. This takes no descriptor, and leaves the
            # process to be reaped.
            with suppress(ChildProcessError):
                os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        return self._wait(0)

    def kill(self) -> None:
        with self._lock:
            if self.returncode is None:
                os.kill(self.pid, signal.SIGKILL)

    def _wait(self, options: int) -> int | None:
        with self._lock:
            if self.returncode is None:
                try:
                    pid, status = os.waitpid(self.pid, options)
                except ChildProcessError:  # reaped by somebody else: Popen says 0, too
                    self.returncode = 0
                else:
                    self.returncode = os.waitstatus_to_exitcode(status) if pid else None
            return self.returncode


class _Server:
    """The prepared process. Any thread may use it."""

    def __init__(self, pid: int, requests: socket.socket) -> None:
        self.pid, self.socket = pid, requests
        self._lock = threading.Lock()  # held from a request to its answer

    @staticmethod
    def start_fresh() -> _Server:
        """In an interpreter of its own, which imports what a worker needs."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-c", _COMMAND, str(theirs.fileno())],
                cwd=_ROOT,
                env={**os.environ, **_ONE_THREAD},
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        assert ours.recv(len(_READY)) == _READY, "the server of prepared workers did not start"
        process.returncode = 0  # it is this class that reaps it
        return _Server(process.pid, ours)

    def start(self, request: Mapping[str, object], fds: Sequence[int]) -> int:
        """Fork a worker, and return its pid.

        Raises:
            OSError: it cannot be forked.
        """
        with self._lock:
            socket.send_fds(self.socket, [json.dumps(request).encode()], fds)
            answer = int(self.socket.recv(32))
        if answer < 0:
            raise OSError(-answer, os.strerror(-answer))
        return answer

    def close(self) -> None:
        self.socket.close()
        os.waitpid(self.pid, 0)


_servers: list[_Server] = []  # none, or one
_starting = threading.Lock()


def _server() -> _Server:
    with _starting:
        if not _servers:
            _servers.append(_Server.start_fresh())
        return _servers[0]


def nest() -> None:
    """Fork a server from this process, which has no second thread yet, and let its pools use it.

    It ends when this process does, however that ends.
    """
    from stager.workers.pool import process

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if not pid:
        _forget_descriptors(theirs)
        _serve(theirs)
    theirs.close()
    _servers[:] = [_Server(pid, ours)]
    process.subprocess = sys.modules[__name__]  # type: ignore[assignment]  # it has what process.py uses


def _forget() -> None:
    """After fork(), in the child: its workers would be its parent's children. It starts them afresh."""
    global _starting  # noqa: PLW0603  # another thread may have held it at the fork
    _starting = threading.Lock()
    while _servers:
        _servers.pop().socket.close()
    process = sys.modules.get("stager.workers.pool.process")
    if process is not None and process.subprocess is sys.modules[__name__]:
        process.subprocess = subprocess


os.register_at_fork(after_in_child=_forget)


def stop() -> None:
    """At the session's end."""
    while _servers:
        _servers.pop().close()


def server_pids() -> frozenset[int]:
    """Processes that outlive a test on purpose."""
    return frozenset(server.pid for server in _servers)


def server_descriptors() -> frozenset[int]:
    """Descriptors of this process that outlive a test on purpose."""
    return frozenset(server.socket.fileno() for server in _servers)


# -- in the server --------------------------------------------------------------------------------------------------


def serve() -> None:
    """In an interpreter of its own: import what workers need, then fork one for each request."""
    import gc

    for name in PRELOADED:
        importlib.import_module(name)
    assert threading.active_count() == 1, "a process with threads cannot be forked"
    gc.collect()
    gc.freeze()
    requests = socket.socket(fileno=int(sys.argv[1]))
    requests.send(_READY)
    _serve(requests)


def _serve(requests: socket.socket) -> NoReturn:
    """Until the other end of the socket is closed."""
    # A launcher may send them to all that its ranks have started. The rank is to have its workers all the same.
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    while True:
        message, fds, flags, _ = socket.recv_fds(requests, _LARGEST_REQUEST, _MOST_DESCRIPTORS)
        if not message:
            os._exit(0)
        assert not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC), "the request is too large"
        pid = _clone()
        if not pid:
            _become_worker(json.loads(message), fds, requests)
        for fd in fds:  # before the answer: the asker may look who holds them
            os.close(fd)
        requests.send(str(pid).encode())


def _forget_descriptors(kept: socket.socket) -> None:
    """Close what the forking process has open: its pipes' readers are not to wait for this process."""
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the descriptor of the listing
            if int(name) not in (0, 1, 2, kept.fileno()):
                os.close(int(name))
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)


def _clone() -> int:
    """os.fork(), but the child's parent is this process's parent. Returns -errno if it fails."""
    python = ctypes.pythonapi
    # PyDLL: the global interpreter lock is held, as os.fork() holds it.
    syscall = ctypes.PyDLL(None, use_errno=True).syscall
    syscall.restype = ctypes.c_long
    python.PyOS_BeforeFork()
    pid = int(syscall(_SYS_CLONE[os.uname().machine], _CLONE_PARENT | signal.SIGCHLD, 0, 0, 0, 0))
    error = ctypes.get_errno()
    (python.PyOS_AfterFork_Parent if pid else python.PyOS_AfterFork_Child)()
    return -error if pid < 0 else pid


def _become_worker(request: dict[str, Any], fds: list[int], requests: socket.socket) -> NoReturn:
    """In the child: what Popen would have prepared; then the bootstrap, which does not return."""
    try:
        _prepare(request, fds, requests)
        bootstrap, *sys.argv[1:] = request["command"]
        exec(bootstrap, {"__name__": "__main__"})
    except BaseException:  # noqa: BLE001  # the edge of the process: nothing of the server's may run
        traceback.print_exc()
    os._exit(1)


def _prepare(request: dict[str, Any], fds: list[int], requests: socket.socket) -> None:
    from stager.workers import faults

    os.setsid()
    numbers = [1, *request["numbers"]]
    above = max(numbers) + 1  # none of the numbers may be taken by another of the descriptors
    moved = [fcntl.fcntl(fd, fcntl.F_DUPFD, above) for fd in fds]
    for fd in fds:
        os.close(fd)
    requests.close()
    for fd, number in zip(moved, numbers, strict=True):
        os.dup2(fd, number)
        os.close(fd)
    os.dup2(1, 2)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.chdir(request["directory"])
    _inherit(**request["inherited"])
    for number in _IGNORED:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _set_command_line(request["command"])
    os.environ.clear()
    os.environ.update(request["environment"])
    faults._DIRECTORY = os.environ.get("STAGER_FAULTS")


_LIMITS = (resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE, resource.RLIMIT_AS, resource.RLIMIT_MEMLOCK)


def _inherited() -> dict[str, Any]:
    """What a child of this process has of it: :func:`_inherit`."""
    status = Path("/proc/self/status").read_text()
    return {
        "umask": int(status.partition("Umask:")[2].split()[0], 8),
        "niceness": os.getpriority(os.PRIO_PROCESS, 0),
        "ionice": list(psutil.Process().ionice()),
        "cores": sorted(os.sched_getaffinity(0)),
        "limits": [resource.getrlimit(limit) for limit in _LIMITS],
    }


def _inherit(
    *, umask: int, niceness: int, ionice: Sequence[int], cores: Sequence[int], limits: Sequence[Sequence[int]]
) -> None:
    """Take over umask, priorities, cores and limits of the process that asked."""
    os.umask(umask)
    os.setpriority(os.PRIO_PROCESS, 0, niceness)
    kind, level = ionice
    if kind != psutil.IOPRIO_CLASS_NONE:
        psutil.Process().ionice(kind, level)
    os.sched_setaffinity(0, cores)
    for limit, (soft, hard) in zip(_LIMITS, limits, strict=True):
        resource.setrlimit(limit, (soft, hard))


def _set_command_line(command: Sequence[str]) -> None:
    """Write over the arguments that ``ps`` and the leak check show, as far as there is room.

    ``arg_start`` and ``arg_end`` are the fields 48 and 49 of ``/proc/self/stat`` (proc(5)).
    """
    with open("/proc/self/stat") as file:
        fields = file.read().rpartition(") ")[2].split()
    start, end = int(fields[45]), int(fields[46])
    bootstrap = command[0][command[0].index("from stager.workers") :]
    text = b"\0".join([b"python", b"-c", bootstrap.encode(), *(word.encode() for word in command[1:])])
    ctypes.memmove(start, text[: end - start - 1].ljust(end - start, b"\0"), end - start)
