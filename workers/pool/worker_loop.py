"""A worker's main loop: take a task, run it, reply."""

from __future__ import annotations

import errno
import os
import pickle
import traceback

from stager.workers.errors import WorkerError
from stager.workers.faults import point
from stager.workers.pool import codec
from stager.workers.pool.channel import TrainerChannel
from stager.workers.pool.messages import Done, Failed, Ready, Shutdown, Task


def serve(channel: TrainerChannel) -> None:
    """Serve the trainer at the other end until there is nothing more to do."""
    # Tasks may have been sent before. Ready says that this worker runs them now: their deadlines begin.
    point("worker.start")
    channel.send(Ready())
    point("worker.ready")
    while (frame := channel.receive()) is not None:
        if isinstance(frame.message, Shutdown):
            point("worker.shutdown")
            return
        if isinstance(frame.message, Task):
            _answer(channel, frame.message, frame.fds, frame.whole)
        # Otherwise the last task's arguments would stay in memory while the worker waits for the next.
        del frame


def _answer(channel: TrainerChannel, task: Task, task_fds: list[int], whole: bool) -> None:
    """Run one task, and reply with what it returned or raised."""
    fds: list[int] = []
    reply: Done | Failed
    try:
        payload, fds = codec.dump_result(_run(task, task_fds, whole), task.label)
        point("task.reply")
        reply = Done(task.task_id, payload)
    except BaseException as error:  # noqa: BLE001  (the edge of the process: a task's SystemExit is a reply, too)
        reply = Failed(task.task_id, _dump_error(task, error), traceback.format_exc())
        codec.close_fds(fds)
    # The kernel duplicates the descriptors when it takes the message: they can be closed after that, and not before.
    channel.send(reply, fds)
    codec.close_fds(fds)


def _run(task: Task, fds: list[int], whole: bool) -> object:
    if not whole:
        raise OSError(
            errno.EMFILE,
            f"{os.strerror(errno.EMFILE)}: the worker could not take all descriptors of the task's tensors; "
            "send fewer storages in one task, or raise `ulimit -n`",
        )
    # Unpickling runs the user's code and may import torch: what it raises is the task's error.
    point("task.receive")
    function, args, kwargs = codec.loads(task.payload, fds)
    point("task.run")
    return function(*args, **kwargs)


def _dump_error(task: Task, error: BaseException) -> bytes:
    """Pickle the exception, or a WorkerError that describes it if pickling does not preserve it."""
    try:
        payload, fds = codec.dumps(error)
        codec.close_fds(fds)
        if isinstance(pickle.loads(payload), BaseException):
            return payload
    except Exception:  # noqa: BLE001  (a user's exception class can fail in any way)
        pass
    try:
        text = str(error)
    except Exception:  # noqa: BLE001  (so can its __str__)
        text = "<no message>"
    return pickle.dumps(WorkerError(f"{task.label} raised {type(error).__name__}: {text}"))
