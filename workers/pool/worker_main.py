"""What a worker process runs: look after itself, import, serve.

NOTE [ A worker's life ]
The worker is started by ``process.py`` with one end of a socket pair. It never imports the trainer's main module. This
file imports next to nothing: priority, signals and the orphan watch are in place before the rest is imported. Torch is
imported only if a task needs it, and saving does not.

A worker ends when
  * it reads Shutdown: it has finished all that was sent before, and exits 0;
  * its parent is gone: it reads what is left in the socket, runs that to the end ("staged means safe"), and exits 0. It sees
    the parent's death through a pidfd and not through end-of-file alone, because a process that the trainer forked may still
    hold the other end of the socket;
  * it is an orphan for longer than ``orphan_timeout_secs``: a watchdog thread ends it, whatever it is doing;
  * it is killed, by the pool or by anybody else.

SIGINT, SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 do not end it. A job manager (SLURM, systemd) sends one of them to every process
of a job, to stop the job or to warn it. What the trainer has staged must still be written then, and so must the last save
that the trainer makes because of that very signal. The trainer drains and stops its workers; if it dies of the signal, they
are orphans. The kernel continues a worker that is stopped (SIGSTOP) when the trainer dies, or it would stay for ever.
"""

from __future__ import annotations

import ctypes
import os
import resource
import select
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress

from stager.workers.faults import point
from stager.workers.pool.options import WorkerSettings

_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_AUTOGROUP_PAUSE_SECS = 0.11
_AUTOGROUP_ATTEMPTS = 20


def main(fd: str, beats: str, settings_json: str) -> None:
    """The arguments of the command line: the socket, the eventfd for signs of life, the settings."""
    exitcode = 1
    try:
        settings = WorkerSettings.from_json(settings_json)
        # 1. The trainer may die at any moment from here on: watch it first.
        parent = _watch_parent(settings, int(beats))
        # 2. Before the imports, which take longest, so that a signal to the whole job does not end the worker in them.
        _ignore_signals()
        _set_up_descriptors()
        # 3. Before the imports, too: they compete with the training for the cores.
        _lower_priority(settings)
        point("worker.import")
        from stager.workers.pool.channel import TrainerChannel
        from stager.workers.pool.worker_loop import serve

        # 4. Until the trainer says Shutdown, or is gone and nothing is left to do. The variable keeps the socket open until
        # the process ends: for the trainer, end-of-file means that.
        channel = TrainerChannel(int(fd), parent)
        serve(channel)
        exitcode = 0
    except BaseException:  # noqa: BLE001  (the edge of the process: the error is printed, and the exit code says so)
        traceback.print_exc()
    finally:
        # Not sys.exit: atexit handlers of imported libraries have no business in a worker, and take time.
        for stream in (sys.stdout, sys.stderr):
            # The process that reads standard error may be gone.
            with suppress(AttributeError, OSError, ValueError):
                stream.flush()
        os._exit(exitcode)


def _watch_parent(settings: WorkerSettings, beats: int) -> int:
    """Return a pidfd of the parent; -1: it is gone. Start a thread that gives signs of life, and ends an orphan in time."""
    # The kernel sends SIGCONT when the parent dies. Asked for before the pidfd is opened, so that no death is missed.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGCONT)
    try:
        parent = os.pidfd_open(settings.parent_pid)
    except ProcessLookupError:
        parent = -1
    # Asked after the pidfd was opened: the parent died before if it is not our parent now, and the pid is another process.
    if parent >= 0 and os.getppid() != settings.parent_pid:
        os.close(parent)
        parent = -1

    def watch() -> None:
        if parent >= 0:
            poll = select.poll()
            poll.register(parent, select.POLLIN)
            while not poll.poll(settings.beat_secs * 1000):
                os.eventfd_write(beats, 1)  # see NOTE [ When a worker is stuck ] in heartbeat.py
        time.sleep(min(settings.orphan_timeout_secs, threading.TIMEOUT_MAX))
        os._exit(1)

    threading.Thread(target=watch, name="stager-orphan-watch", daemon=True).start()
    return parent


def _ignore_signals() -> None:
    """Ignore them by handlers: a program that a task starts would inherit SIG_IGN. System calls are restarted."""
    for number in _IGNORED:
        signal.signal(number, lambda *_: None)
        signal.siginterrupt(number, False)
    # A process that a task forks heeds them. They are blocked during the fork: the child would lose one that came before it
    # has set the default action.
    os.register_at_fork(before=_block_signals, after_in_parent=_unblock_signals, after_in_child=_heed_signals)


def _block_signals() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED)


def _unblock_signals() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _IGNORED)


def _heed_signals() -> None:
    for number in _IGNORED:
        signal.signal(number, signal.SIG_DFL)
    _unblock_signals()


def _set_up_descriptors() -> None:
    """Allow as many descriptors as possible. Keep the socket, and locks of the trainer, from programs that a task starts."""
    with suppress(OSError, ValueError):
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    for name in os.listdir("/proc/self/fd"):
        # The descriptor of the listing itself is closed by now.
        with suppress(OSError):
            if int(name) > 2:
                os.set_inheritable(int(name), False)


def _lower_priority(settings: WorkerSettings) -> None:
    """A container may forbid any of this; the worker then goes on at the usual priority."""
    with suppress(OSError):
        os.nice(settings.nice)
    with suppress(OSError):
        _lower_autogroup(settings.nice)
    if settings.ionice != "none":
        import psutil

        with suppress(OSError, psutil.Error):
            me = psutil.Process()
            if settings.ionice == "idle":
                me.ionice(psutil.IOPRIO_CLASS_IDLE)
            elif me.ionice().ioclass != psutil.IOPRIO_CLASS_IDLE:  # as the trainer's is: lower than this one
                me.ionice(psutil.IOPRIO_CLASS_BE, 7)


def _autogroup_nice(pid: int) -> int:
    """Return the niceness of a process's session; 0 if it cannot be read."""
    with suppress(OSError, ValueError, IndexError), open(f"/proc/{pid}/autogroup") as file:
        return int(file.read().split()[-1])  # /autogroup-25 nice 0
    return 0


def _lower_autogroup(nice: int) -> None:
    """Lower the priority of this worker's session, where the kernel groups processes by session (sched(7), "autogroup").

    Niceness counts within a session only, and each worker has its own. Between sessions, the group's niceness counts. It is
    relative to the trainer's session, too.
    """
    nice = min(19, _autogroup_nice(os.getppid()) + nice)
    for _ in range(_AUTOGROUP_ATTEMPTS):
        try:
            with open("/proc/self/autogroup", "w") as file:
                file.write(str(nice))
        except BlockingIOError:
            # The kernel takes one change in 100 ms from all unprivileged processes together.
            time.sleep(_AUTOGROUP_PAUSE_SECS)
        else:
            return
