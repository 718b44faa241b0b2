"""Processes that start at once: a prepared process, with torch imported and no Python thread, forks each of them.

A fresh interpreter that imports torch, its distributed packages and stager needs several seconds of a core. The server needs
them once per pytest process.

1. The first test that asks (:func:`shared`) starts the server. It imports what most processes need.
2. Each request names a function and modules. The server imports them, so that later processes have them, too, and forks.
3. The child gets the environment of the test, a session of its own, and files for what it prints. It calls the function.
   When the function returns or raises, the child's interpreter ends as that of any program would.
4. The server reaps its children as told. It ends when the pipe of its requests is closed (:func:`stop`, or the end of
   pytest).
5. A child that starts processes of its own, as torchrun does, forks a server of its own first (:func:`nest`).

Tests about scripts, ``python -c``, standard input or the main module need a fresh interpreter and do not use it.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TextIO

from tests import prepared_workers

ROOT = Path(__file__).resolve().parents[1]
_READY = "ready"
_COMMAND = "from tests.fork_server import serve; serve()" + " " * 200  # room for a worker's: see prepared_workers
_PRELOADED = (
    "torch",
    "torch._dynamo",  # the first optimizer of a process imports it
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch.testing",
    "stager",
    "stager.workers.checkpoint.formats.torch_save",  # imported late by the first save
    "pytest",
    "psutil",
    *prepared_workers.PRELOADED,
)


class ForkServer:
    """The prepared process, and the processes that it has forked and nobody has reaped. Any thread may use it.

    Attributes:
        pid: process id of the server itself.
    """

    def __init__(self, pid: int, requests: TextIO, answers: TextIO) -> None:
        self.pid = pid
        self._requests, self._answers = requests, answers
        self._running: set[int] = set()
        self._lock = threading.Lock()  # held from a request to its answer

    @staticmethod
    def start_fresh() -> ForkServer:
        """In an interpreter of its own, which imports what most processes need."""
        # One thread each: a test's processes share the machine, and a fork leaves OpenMP's threads behind.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, "-c", _COMMAND],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline().strip() == _READY, "the fork server did not start"
        process.returncode = 0  # it is this class that reaps it
        return ForkServer(process.pid, process.stdin, process.stdout)

    def start(
        self,
        function: str,
        arguments: Iterable[object] = (),
        *,
        stdout: Path,
        stderr: Path,
        environment: dict[str, str] | None = None,
        modules: Iterable[str] = (),
        held: Iterable[Path] = (),
    ) -> int:
        """Fork a process that calls ``module:function``.

        Args:
            arguments: of the function; JSON has to hold them.
            stdout, stderr: what the process prints goes to the end of these files, or into these FIFOs.
            environment: its whole environment; by default that of the calling process at this moment.
            modules: further modules that the process needs.
            held: FIFOs that somebody reads; the process holds a write end of each for as long as it lives.

        Returns:
            Its process id. It stays valid until :meth:`wait`.
        """
        request = {
            "function": function,
            "arguments": list(arguments),
            "environment": dict(os.environ) if environment is None else environment,
            "output": [str(stdout), str(stderr)],
            "modules": list(modules),
            "held": list(map(str, held)),
        }
        pid = int(self._ask(request))
        self._running.add(pid)
        return pid

    def wait(self, pid: int, timeout_secs: float | None = None) -> int:
        """Wait until the process has ended, and reap it.

        Returns:
            Its exit code, negative for a signal.

        Raises:
            TimeoutError: it has not ended in ``timeout_secs``; it goes on.
        """
        ended = os.pidfd_open(pid)
        try:
            if not select.select([ended], [], [], timeout_secs)[0]:
                raise TimeoutError(f"process {pid} did not end within {timeout_secs:g} s")
        finally:
            os.close(ended)
        self._running.discard(pid)
        return int(self._ask({"wait": pid}))

    def kill(self, pid: int) -> None:
        """SIGKILL a process that :meth:`wait` has not reaped, and what it started in its session; then reap it."""
        if pid in self._running:
            with suppress(ProcessLookupError):  # not in its session yet: it is killed alone
                os.killpg(pid, signal.SIGKILL)
            os.kill(pid, signal.SIGKILL)
            self.wait(pid)

    def descriptors(self) -> tuple[int, int]:
        """The pipes' ends in this process."""
        return self._requests.fileno(), self._answers.fileno()

    def close(self) -> None:
        """End the server. Its children go on."""
        self._requests.close()
        os.waitpid(self.pid, 0)
        self._answers.close()

    def _ask(self, request: object) -> str:
        with self._lock:
            self._requests.write(json.dumps(request) + "\n")
            self._requests.flush()
            answer: dict[str, str] = json.loads(self._answers.readline())
        assert "error" not in answer, answer["error"]
        return answer["ok"]


# -- this process's server ------------------------------------------------------------------------------------------

_servers: list[ForkServer] = []  # none, or one: the pytest process's
_starting = threading.Lock()


def shared() -> ForkServer:
    """The server of this pytest process. The first call starts it."""
    with _starting:
        if not _servers:
            _servers.append(ForkServer.start_fresh())
        return _servers[0]


def nest() -> None:
    """Fork a server from this process, which has no second thread yet: :func:`shared` is that one from now on.

    Returns in the caller only. In a process that the new server forks, the requested function runs, and then SystemExit is
    raised.
    """
    their_requests, our_requests = os.pipe()
    our_answers, their_answers = os.pipe()
    pid = os.fork()
    if pid:
        os.close(their_requests)
        os.close(their_answers)
        _servers.append(ForkServer(pid, os.fdopen(our_requests, "w"), os.fdopen(our_answers)))
        return
    os.close(our_requests)
    os.close(our_answers)
    _serve(os.fdopen(their_requests), os.fdopen(their_answers, "w"))
    sys.exit()


def stop() -> None:
    """At the session's end."""
    while _servers:
        _servers.pop().close()


def server_pids() -> frozenset[int]:
    """Processes that outlive a test on purpose."""
    return frozenset(server.pid for server in _servers)


def server_descriptors() -> frozenset[int]:
    """Descriptors of this process that outlive a test on purpose."""
    return frozenset(fd for server in _servers for fd in server.descriptors())


# -- in the server --------------------------------------------------------------------------------------------------


def serve() -> None:
    """Fork and reap as told, until standard input is closed. Returns in every child, when its function has returned."""
    import gc

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an import prints is no answer
    for name in _PRELOADED:
        importlib.import_module(name)
    assert threading.active_count() == 1, "a process with threads cannot be forked"
    gc.collect()
    gc.freeze()  # a child's collections touch nothing of what all share
    print(_READY, file=answers, flush=True)
    _serve(sys.stdin, answers)


def _serve(requests: TextIO, answers: TextIO) -> None:
    """Returns in every child, when its function has returned."""
    for line in iter(requests.readline, ""):
        call, answer = _handle(json.loads(line))
        if call is not None:
            answers.close()
            if requests is not sys.stdin:
                requests.close()
            call()
            return
        print(json.dumps(answer), file=answers, flush=True)
    os._exit(0)  # whoever closes the pipe waits: an interpreter with torch in it takes its time to end


def _handle(request: dict[str, Any]) -> tuple[Callable[[], object] | None, dict[str, str]]:
    """In the server: None, and the answer. In a child: what it has to call."""
    if "wait" in request:
        return None, {"ok": str(os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1]))}
    module, _, name = request["function"].partition(":")
    try:
        for needed in request["modules"]:
            importlib.import_module(needed)
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # noqa: BLE001  # it goes to the test
        return None, {"error": f"{request['function']}: {error!r}"}
    # Before the fork: when the reader has its answer, end-of-file means that the process is gone.
    held = [os.open(path, os.O_WRONLY) for path in request["held"]]
    pid = os.fork()
    if pid:
        for fd in held:
            os.close(fd)
        return None, {"ok": str(pid)}
    _become_process(request)
    return lambda: function(*request["arguments"]), {}


def _become_process(request: dict[str, Any]) -> None:
    """In the child: what an interpreter that the test had started itself would have."""
    from stager.workers import faults

    os.setsid()
    for path, number in zip(request["output"], (1, 2), strict=True):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(fd, number)
        os.close(fd)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite that runs in the background has it ignored
    os.environ.clear()
    os.environ.update(request["environment"])
    faults._DIRECTORY = os.environ.get("STAGER_FAULTS")
    if prepared_workers.FRESH not in os.environ:
        prepared_workers.nest()


def exit_now() -> NoReturn:
    """End this process without what an interpreter does at its end: a rank's group may have lost members."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
