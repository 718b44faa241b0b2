"""The messages between a pool and its workers. No I/O here.

Every message carries the pool's ``nonce`` (a worker or pool ignores what is not of its own run) and, where it
belongs to a task, the task's id. ``payload`` is a pickle made by :mod:`stager.workers.pool.codec`; file descriptors that it
refers to travel beside it (see :mod:`stager.workers.pool.channel`).

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
    nonce: str
    pid: int


@dataclass(frozen=True, slots=True)
class Task:
    nonce: str
    task_id: int
    label: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class Done:
    nonce: str
    task_id: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class Failed:
    """``payload`` is the pickled exception, ``traceback`` its text in the worker."""

    nonce: str
    task_id: int
    payload: bytes
    traceback: str


@dataclass(frozen=True, slots=True)
class Shutdown:
    nonce: str


Message = Ready | Task | Done | Failed | Shutdown
"""Everything that travels on a channel."""
