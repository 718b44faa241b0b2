"""The messages between a pool and its workers. No I/O here.

``payload`` is a pickle made by :mod:`stager.workers.pool.codec`. The file descriptors that it refers to travel beside the
message (``channel.py``).

    pool   -> worker   Task       in any state but after Shutdown; answered by exactly one Done or Failed
    pool   -> worker   Shutdown   once; the worker finishes what it was sent before, then exits 0
    worker -> pool     Ready      once, when imports are done and tasks are taken
    worker -> pool     Done       the task returned
    worker -> pool     Failed     the task raised, or its result could not be pickled
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Ready:
    pass


@dataclass(frozen=True, slots=True)
class Task:
    task_id: int
    label: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class Done:
    task_id: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class Failed:
    """``payload`` is the pickled exception, ``traceback`` its text in the worker."""

    task_id: int
    payload: bytes
    traceback: str


@dataclass(frozen=True, slots=True)
class Shutdown:
    pass


Message = Ready | Task | Done | Failed | Shutdown
