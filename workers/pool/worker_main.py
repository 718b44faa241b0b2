"""What a worker process runs: look after itself, import, serve.

NOTE [ A worker's life ]
The worker is started by ``process.py`` with one end of a socket pair. It never imports the trainer's main module. This
file imports next to nothing: priority, signals and the orphan watch are in place before the rest is imported, and torch only
if a task needs it: saving does not.
It ends when
  * it reads Shutdown: it has finished all that was sent before, and exits 0;
  * its parent is gone: what was sent before is in the socket, so it reads and runs that to the end ("staged means
    safe"), then exits 0. The parent's death is seen through a pidfd and not through end-of-file alone, because a
    process that the trainer forked may still hold the other end of the socket;
  * it is an orphan for longer than ``orphan_timeout_secs``: a watchdog thread ends it, whatever it is doing;
  * it is killed, by the pool or by anybody else.
SIGINT, SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 do not end it: a job manager that stops a job, or warns of it (SLURM,
systemd), sends one of these to every process of it, and what the trainer has staged must still be written, as must the
last save that the trainer makes because of that very signal. The trainer drains and stops its workers; if it dies of the
signal, they are orphans. One that is stopped (SIGSTOP) when the trainer dies is continued by the kernel, or it would stay
for ever.
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
        parent = _watch_parent(settings, int(beats))
        _ignore_signals()
        _set_up_descriptors()
        _lower_priority(settings)
        point("worker.import")
        from stager.workers.pool.trainer_channel import TrainerChannel
        from stager.workers.pool.worker_loop import serve

        channel = TrainerChannel(int(fd), parent)
        serve(channel, settings)
        exitcode = 0
    except BaseException:  # noqa: BLE001  (the edge of the process: what escapes is printed, and the exit code says so)
        traceback.print_exc()
    finally:
        # Not sys.exit: atexit handlers of imported libraries have no business in a worker, and take time.
        for stream in (sys.stdout, sys.stderr):
            with suppress(AttributeError, OSError, ValueError):  # whoever read our stderr may be gone
                stream.flush()
        os._exit(exitcode)


def _watch_parent(settings: WorkerSettings, beats: int) -> int:
    """A pidfd of the parent (-1: it is gone), and a thread that gives signs of life, and ends this process when it is an
    orphan for too long."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGCONT)
    try:
        parent = os.pidfd_open(settings.parent_pid)
    except ProcessLookupError:
        parent = -1
    if parent >= 0 and os.getppid() != settings.parent_pid:  # it died before we looked; the pid is somebody else's
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
    """With handlers and not SIG_IGN, which whatever a task starts would inherit; with restarted system calls."""
    for number in _IGNORED:
        signal.signal(number, lambda *_: None)
        signal.siginterrupt(number, False)
    # What a task forks heeds them, also when they come before the fork is over.
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
    """What a task starts must not keep our socket, or a lock of the trainer's, open; and as many as we may have."""
    with suppress(OSError, ValueError):
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the descriptor of the listing itself
            if int(name) > 2:
                os.set_inheritable(int(name), False)


def _lower_autogroup(nice: int) -> None:
    """Where the kernel groups processes by session (sched(7), "autogroup"; on most desktops and many servers), niceness
    counts within a session only, and each worker has its own: between sessions it is the group's niceness that counts."""
    for _ in range(_AUTOGROUP_ATTEMPTS):
        try:
            with open("/proc/self/autogroup", "w") as file:
                file.write(str(nice))
        except BlockingIOError:  # the kernel takes one change in 100 ms from all unprivileged processes together
            time.sleep(_AUTOGROUP_PAUSE_SECS)
        else:
            return


def _lower_priority(settings: WorkerSettings) -> None:
    """A container may forbid any of it; work goes on at the usual priority."""
    with suppress(OSError):
        os.nice(settings.nice)
    with suppress(OSError):
        _lower_autogroup(settings.nice)
    if settings.ionice != "none":
        _lower_io_priority(idle=settings.ionice == "idle")


def _lower_io_priority(*, idle: bool) -> None:
    import psutil

    with suppress(OSError, psutil.Error):
        if idle:
            psutil.Process().ionice(psutil.IOPRIO_CLASS_IDLE)
        else:
            psutil.Process().ionice(psutil.IOPRIO_CLASS_BE, 7)
