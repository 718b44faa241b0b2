"""A worker's main loop: take a task, run it, reply."""

from __future__ import annotations

import errno
import os
import pickle
import traceback

from stager.workers.errors import WorkerError
from stager.workers.faults import point
from stager.workers.pool import codec
from stager.workers.pool.messages import Done, Failed, Ready, Shutdown, Task
from stager.workers.pool.options import WorkerSettings
from stager.workers.pool.torch_import import set_threads_when_imported
from stager.workers.pool.trainer_channel import TrainerChannel


def serve(channel: TrainerChannel, settings: WorkerSettings) -> None:
    """Serve the trainer at the other end until there is nothing more to do."""
    set_threads_when_imported(settings.torch_threads)
    point("worker.start")
    channel.send(Ready(settings.nonce, os.getpid()))
    point("worker.ready")
    while (frame := channel.receive()) is not None:
        if frame.message.nonce != settings.nonce:
            codec.close_fds(frame.fds)
        elif isinstance(frame.message, Shutdown):
            point("worker.shutdown")
            return
        elif isinstance(frame.message, Task):
            _answer(channel, frame.message, frame.fds, frame.whole)
        del frame  # or the last task's arguments would stay in memory while we wait for the next


def _answer(channel: TrainerChannel, task: Task, task_fds: list[int], whole: bool) -> None:
    """Run one task; whatever happens becomes a reply."""
    fds: list[int] = []
    reply: Done | Failed
    try:
        payload, fds = codec.dumps(_run(task, task_fds, whole))
        point("task.reply")
        reply = Done(task.nonce, task.task_id, payload)
    except BaseException as error:  # noqa: BLE001  (the edge of the process: SystemExit of a task is an answer too)
        reply = Failed(task.nonce, task.task_id, _dump_error(task, error), traceback.format_exc())
        codec.close_fds(fds)
    channel.send(reply, fds)
    codec.close_fds(fds)


def _run(task: Task, fds: list[int], whole: bool) -> object:
    if not whole:
        raise OSError(
            errno.EMFILE,
            f"{os.strerror(errno.EMFILE)}: the worker could not take all descriptors of the task's tensors; "
            "send fewer storages in one task, or raise `ulimit -n`",
        )
    point("task.receive")
    function, args, kwargs = codec.loads(task.payload, fds)
    point("task.run")
    return function(*args, **kwargs)


def _dump_error(task: Task, error: BaseException) -> bytes:
    """The pickled exception, or a WorkerError that describes it when it does not survive pickling."""
    try:
        payload, fds = codec.dumps(error)
        codec.close_fds(fds)
        loaded = pickle.loads(payload)
    except Exception:  # noqa: BLE001  (a user's exception class can fail in any way)
        loaded = None
    if isinstance(loaded, BaseException):
        return payload
    return pickle.dumps(WorkerError(f"{task.label} raised {type(error).__name__}: {_text(error)}"))


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # noqa: BLE001  (so can its __str__)
        return "<no message>"
