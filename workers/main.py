"""What a worker process runs: announce itself, then decode, run, reply, until told to stop or orphaned.

NOTE [ A worker's life ]
The worker is started by ``process.py`` with one end of a socket pair. It never imports the trainer's main module.
It ends when
  * it reads Shutdown: it has finished all that was sent before, and exits 0;
  * its parent is gone: what was sent before is in the socket, so it reads and runs that to the end ("staged means
    safe"), then exits 0. The parent's death is seen through a pidfd and not through end-of-file alone, because a
    process that the trainer forked may still hold the other end of the socket;
  * it is an orphan for longer than ``orphan_timeout_secs``: a watchdog thread ends it, whatever it is doing.
SIGINT is ignored: Ctrl-C is for the trainer, which drains its saves and then stops its workers.
"""

from __future__ import annotations

import json
import os
import pickle
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass

import psutil

from workers import codec
from workers.channel import Inbox, Outbox
from workers.errors import WorkerError
from workers.faults import point
from workers.protocol import Done, Failed, Message, Ready, Shutdown, Task


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """What a worker is told when it is started.

    Attributes:
        nonce: the pool's.
        parent_pid: the pool's process.
        nice: added to the process's niceness, 0..19.
        ionice: "none", "low" (best effort, lowest) or "idle".
        orphan_timeout_secs: how long an orphan may go on working.
        torch_threads: intra-op threads.
    """

    nonce: str
    parent_pid: int
    nice: int = 0
    ionice: str = "none"
    orphan_timeout_secs: float = 600.0
    torch_threads: int = 1

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> WorkerSettings:
        return WorkerSettings(**json.loads(text))


def main(fd: int, settings_json: str) -> None:
    settings = WorkerSettings.from_json(settings_json)
    exitcode = 1
    try:
        parent = _watch_parent(settings)
        _set_up_process(settings)
        with socket.socket(fileno=fd) as sock:
            _serve(sock, parent, settings.nonce)
        exitcode = 0
    except BaseException:  # noqa: BLE001  (the edge of the process: what escapes is printed, and the exit code says so)
        traceback.print_exc()
    finally:
        # Not sys.exit: atexit handlers of imported libraries have no business in a worker, and take time.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exitcode)


def _serve(sock: socket.socket, parent: int, nonce: str) -> None:
    outbox = Outbox(sock)
    point("worker.start")
    _send(outbox, Ready(nonce, os.getpid()), [])
    for message, fds in _receive(sock, parent):
        if message.nonce != nonce:
            codec.close_fds(fds)
        elif isinstance(message, Shutdown):
            return
        elif isinstance(message, Task):
            _send(outbox, *_run(message, fds))


def _set_up_process(settings: WorkerSettings) -> None:
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(settings.torch_threads)
    process = psutil.Process()
    with suppress(OSError, psutil.Error):  # a container may forbid it; work goes on at the usual priority
        os.nice(settings.nice)
        if settings.ionice == "low":
            process.ionice(psutil.IOPRIO_CLASS_BE, 7)
        elif settings.ionice == "idle":
            process.ionice(psutil.IOPRIO_CLASS_IDLE)


def _watch_parent(settings: WorkerSettings) -> int:
    """A pidfd of the parent (-1: it is gone), and a thread that ends this process when it is an orphan for too long."""
    try:
        parent = os.pidfd_open(settings.parent_pid)
    except ProcessLookupError:
        parent = -1
    if parent >= 0 and os.getppid() != settings.parent_pid:  # it died before we looked; the pid is somebody else's
        os.close(parent)
        parent = -1

    def watch() -> None:
        if parent >= 0:
            select.select([parent], [], [])
        time.sleep(settings.orphan_timeout_secs)
        os._exit(1)

    threading.Thread(target=watch, name="stager-orphan-watch", daemon=True).start()
    return parent


def _receive(sock: socket.socket, parent: int) -> Iterator[tuple[Message, list[int]]]:
    inbox = Inbox(sock)
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    if parent >= 0:
        poll.register(parent, select.POLLIN)
    orphaned = parent < 0
    while True:
        ready = dict(poll.poll(0 if orphaned else None))
        if sock.fileno() in ready:
            try:
                if not inbox.receive():
                    return
            except ConnectionError:
                return
            yield from inbox.messages()
        elif orphaned:
            return  # nothing is left in the socket
        if parent in ready and not orphaned:
            orphaned = True
            poll.unregister(parent)


def _run(task: Task, fds: list[int]) -> tuple[Message, list[int]]:
    """Run one task; whatever happens becomes a reply."""
    try:
        function, args, kwargs = codec.loads(task.payload, fds)
        payload, out = codec.dumps(function(*args, **kwargs))
        point("task.reply")
        return Done(task.nonce, task.task_id, payload), out
    except BaseException as error:  # noqa: BLE001  (the edge of the process: SystemExit of a task is an answer too)
        return Failed(task.nonce, task.task_id, _dump_error(task, error), traceback.format_exc()), []


def _dump_error(task: Task, error: BaseException) -> bytes:
    """The pickled exception, or a WorkerError that describes it when it does not survive pickling."""
    try:
        payload, fds = codec.dumps(error)
        codec.close_fds(fds)
        pickle.loads(payload)
    except Exception:  # noqa: BLE001  (a user's exception class can fail in any way)
        payload = pickle.dumps(WorkerError(f"{task.label} raised {type(error).__name__}: {_text(error)}"))
    return payload


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # noqa: BLE001  (so can its __str__)
        return "<no message>"


def _send(outbox: Outbox, message: Message, fds: list[int]) -> None:
    outbox.put(message, fds)
    with suppress(ConnectionError):  # an orphan has nobody to tell
        outbox.flush()
