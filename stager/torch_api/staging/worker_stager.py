"""``WorkerStager``: the deep copy with offload, run by worker processes.

NOTE [ Who owns what, and until when ]
- The *sources* are the user's. They are unchanged from ``stage()`` until its Future is done: the user sees to that, or
  guarded optimizers wait. The stager holds their storages until then, so that they may be dropped.
- The *slab* of a result is leased from before the first byte is written until nothing refers to the result any more, or
  until ``release()``. A later ``stage()`` gets another slab.
- A *share* of the copy is a task of the pool. It may run more than once, never twice at a time, and writes the same bytes
  to the same places. A Future fails only when no worker writes into the slab any more.
"""

from __future__ import annotations

import os
import pickle
import re
import threading
from concurrent.futures import Future
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from torch.multiprocessing import get_sharing_strategy
from torch.optim import Optimizer

from stager.config import load_config
from stager.config.arguments import shown
from stager.config.host import available_memory_bytes
from stager.config.precedence import ConfigSource
from stager.ranks.launch import local_world_size
from stager.saving.setup import start_pool
from stager.saving.staging_thread import StagingThread
from stager.sharing.sharer import SharingOptions, SourceSharer
from stager.snapshot.copying import Copier
from stager.snapshot.guard import Guard
from stager.torch_api.staging.contracts import AsyncStager, CheckpointStager, StateDict
from stager.torch_api.staging.result_memory import ResultMemory
from stager.torch_api.staging.state_dict_stager import storages_of
from stager.torch_api.staging.worker_staging import WorkerStaging, place, share_sources
from stager.workers.checkpoint.storage.paths import local_path
from stager.workers.device.streams import SideStreams
from stager.workers.errors import ArgumentError, ClosedError, UnstageableError, UsageError
from stager.workers.offload.packed_state import PackedState, pack, path_of
from stager.workers.staged_copy.persisting import persist_copy
from stager.workers.staged_copy.share import prepare

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


class WorkerStager(CheckpointStager, AsyncStager, AbstractContextManager["WorkerStager"]):
    """Stages state dicts in worker processes, into shared memory.

    :meth:`stage` returns a Future at once. Workers copy the large CPU tensors, which are moved into shared memory the first
    time (docs/location.md says what that changes), and rebuild the state dict; the trainer's own thread copies what they
    cannot read: small tensors, tensors on devices, memory that cannot be moved. The result is what ``copy.deepcopy`` would
    make, over shared memory that belongs to it.

    One thread at a time may call :meth:`stage`. Close the stager after the last save, or use it as a context manager.

    Args:
        config: as for ``Checkpointer``: a path of a YAML file, a mapping, a ``StagerConfig``, or None. Its section
            ``workers`` holds, and ``staging.share_min_bytes``, ``staging.copy_threads`` and ``arena.max_host_bytes``: the
            memory that all results that are held may take together.

    Raises:
        ConfigError: a key or value that is not known.
        WorkerStartError: the operating system refused to start a process.
    """

    _synchronize_after_execute: bool = False  # stage() returns a Future

    def __init__(self, config: ConfigSource = None) -> None:
        self._config = load_config(config)
        local_size = local_world_size(os.environ)
        staging = self._config.staging
        self._owner = os.getpid()
        self._closed = False
        self._lock = threading.Lock()
        self._last: Future[None] = Future()  # of the last stage(). It has no result: that would keep a lease
        self._last.set_result(None)
        max_bytes = self._config.arena.resolve_max_host_bytes(available_memory_bytes(), local_size)
        self._memory = ResultMemory(max_bytes)
        self._copier = Copier(staging.resolve_copy_threads())
        self._thread = StagingThread()
        self._guard = Guard(self._wait_before_step)
        self._num_workers = self._config.workers.resolve_count(local_size)
        self._pool = start_pool(self._config.workers, local_size)
        self._sharer = SourceSharer(
            self._pool, self._num_workers, SharingOptions("workers", min_bytes=staging.share_min_bytes)
        )
        for _ in range(self._num_workers):
            self._pool.hand_over(prepare)  # each worker gets one: it goes to the one with the fewest tasks

    def stage(
        self, state_dict: StateDict, *, persist_to: str | os.PathLike[str] | None = None, **kwargs: Any
    ) -> Future[StateDict]:
        """Copy ``state_dict``.

        The state must not be changed until the copy is done: when the Future is, or :meth:`synchronize_staging` returns. The
        optimizers given to :meth:`guard` wait for it by themselves.

        Args:
            state_dict: what to stage; any object that can be deep-copied.
            persist_to: a file to write the copy to as well, as ``torch.save`` does. The Future is done when the file is
                durable; the copy is done before that.
            **kwargs: ignored; callers written for torch's stagers may pass some.

        Returns:
            A Future of the copy. It raises WorkerDiedError (``pid``) if workers died ``workers.max_restarts`` times at it,
            and StorageError if the file could not be written.

        Raises:
            UnstageableError: a value cannot be copied, or not be written to a file; names its key path. Nothing was copied.
            MemoryBudgetError: results that are still held leave no room.
            ClosedError: the stager is closed, or belongs to the process that forked this one.
            ArgumentError: ``persist_to`` is no path.
            UsageError: torch's sharing strategy is ``file_system``, with which shared memory cannot be sent.
        """
        self._check_usable("stage()")
        path = "" if persist_to is None else _absolute(persist_to)
        packed = pack(state_dict)
        if path:
            _check_nameable(state_dict, packed)
        with self._lock:
            staging = self._prepare(packed)
            result: Future[StateDict] = Future()
            result.set_running_or_notify_cancel()  # a copy that has begun cannot be cancelled
            self._last = Future()
            self._thread.run(partial(self._run, [staging], result, self._last, path))
        return result

    def _prepare(self, packed: PackedState) -> WorkerStaging:
        places = place(packed.storages)
        slab, is_warm = self._memory.lease(places.nbytes)  # before anything is moved: it may be refused
        tasks, numbers, live_sources = share_sources(
            packed.storages, places, self._sharer, self._config.staging.share_min_bytes, self._num_workers
        )
        return WorkerStaging(
            packed=packed,
            places=places,
            tasks=tasks,
            numbers=numbers,
            live_sources=live_sources,
            slab=slab,
            is_warm=is_warm,
            live_slabs=self._memory.live_slabs(),
            streams=SideStreams({storage.device for storage in packed.storages}),
        )

    def _run(
        self, prepared: list[WorkerStaging], result: Future[StateDict], completion: Future[None], path: str
    ) -> None:
        """In the staging thread: see a staging to its end, and resolve its Futures."""
        try:
            # Taken out of the list: the caller of this function would otherwise keep the sources and the lease.
            state, copy = prepared.pop().run(self._pool, self._copier)
            if path:
                written = self._pool.submit(persist_copy, copy, path)
                written.add_done_callback(partial(_settle, result, state))
        except BaseException as error:  # noqa: BLE001  (the edge of the thread: whoever waits for the Futures gets it)
            result.set_exception(error)
            completion.set_exception(error)
            return
        completion.set_result(None)
        if not path:
            result.set_result(state)

    def synchronize_staging(self) -> None:
        """Wait until the state given to the last :meth:`stage` may be changed, and raise what its copy raised."""
        self._last.result()

    def _wait_before_step(self) -> None:
        if not self._thread.is_current:  # a callback of a Future, which steps: that copy is made
            self._thread.wait()

    def guard(self, *optimizers: Optimizer) -> None:
        """Have the steps of these optimizers wait until no state is being copied.

        Their parameters and state then need no other care between :meth:`stage` and the end of its Future. What else changes
        the state (a forward pass that updates buffers) still has to wait.

        Raises:
            ArgumentError: not a torch optimizer.
            ClosedError: the stager is closed.
        """
        self._check_usable("guard()")
        self._guard.add(*optimizers)

    def release(self, staged: StateDict) -> int:
        """End the lease of a result now: the next ``stage()`` may overwrite it, even if it is still referred to.

        Returns 1; 0 if it was released before, or is no result of this stager.
        """
        return self._memory.release(storages_of(staged))

    def close(self) -> None:
        """Wait for what was begun, then end the workers and free the memory that no result has. Idempotent.

        Results stay valid; their memory is freed with them. Does nothing in a forked child.

        Raises:
            UsageError: called by a callback of one of the stager's Futures, which it would wait for.
        """
        if os.getpid() != self._owner:
            return
        if self._thread.is_current or self._pool.in_callback:
            raise UsageError(
                "WorkerStager.close() was called by a callback of one of its Futures; it would wait for that very "
                "callback. Call it from another thread"
            )
        self._closed = True
        self._guard.close()
        self._thread.close()
        self._pool.close()
        self._copier.close()
        self._memory.close()

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _check_usable(self, call: str) -> None:
        if os.getpid() != self._owner:
            raise ClosedError(
                f"this WorkerStager belongs to process {self._owner}; a forked child cannot use it: make a new one there"
            )
        if self._closed:
            raise ClosedError(f"WorkerStager.{call} was called after close(); make a new stager")
        if get_sharing_strategy() == "file_system":  # type: ignore[no-untyped-call]  # torch does not annotate it
            raise UsageError(
                "WorkerStager shares memory by descriptors, and torch's sharing strategy is file_system; call "
                'torch.multiprocessing.set_sharing_strategy("file_descriptor"), or use DefaultStager'
            )


def _absolute(path: object) -> str:
    if not isinstance(path, str | os.PathLike):
        raise ArgumentError(f"persist_to must be the path of a file, got {shown(path)}")
    return local_path(path, "persist_to")


def _check_nameable(state: Any, packed: PackedState) -> None:
    """Refuse what a file cannot hold, because it is no class or function that an import finds.

    Raises:
        UnstageableError: naming its key path.
    """
    for value in packed.shared:
        try:
            pickle.dumps(value, pickle.HIGHEST_PROTOCOL, buffer_callback=_discard)
        except Exception as error:
            what = _ADDRESS.sub("", f"{type(error).__name__}: {error}")
            reason = (
                f"it can be staged, but not be written to a file: {what}; leave it out, or stage without persist_to"
            )
            raise UnstageableError(path_of(state, value), reason) from error


def _discard(buffer: pickle.PickleBuffer) -> None:
    """Keep an array's bytes out of the pickle, which is made to see whether it can be."""


def _settle(result: Future[StateDict], state: StateDict, written: Future[None]) -> None:
    error = written.exception()
    if error is None:
        result.set_result(state)
    else:
        result.set_exception(error)
