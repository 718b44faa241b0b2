"""``DefaultStager``: one class for ``torch.distributed.checkpoint.staging``'s and ``_experimental.staging``'s."""

from __future__ import annotations

from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from enum import Enum
from functools import partial
from typing import Any

from stager.torch_api.staging import streams
from stager.torch_api.staging.contracts import AsyncStager, CheckpointStager, StateDict
from stager.torch_api.staging.options import CheckpointStagerConfig, StagingOptions, auto_options, resolve
from stager.torch_api.staging.state_dict_stager import StateDictStager
from stager.workers.errors import ClosedError
from stager.workers.offload import HookMemo


class _State(Enum):
    OPEN = "open"
    CLOSED = "closed"


class DefaultStager(CheckpointStager, AsyncStager):
    """Stages state dicts, in the calling thread or in one background thread.

    Not thread-safe. Close it after the last save, or use it as a context manager.

    Without leases (the default, as in torch) results share buffers: the next ``stage()`` of the same tensors overwrites
    the result of the one before. Wait for the first save's upload before the next ``stage()``, or set
    ``StagingOptions(use_leases=True)``.

    Args:
        config: ``StagingOptions``, ``CheckpointStagerConfig`` or torch's own; every field ``"auto"`` if not given.

    Raises:
        AssertionError: an option needs an accelerator and there is none.
    """

    def __init__(self, config: StagingOptions | CheckpointStagerConfig | None = None) -> None:
        self._config = auto_options() if config is None else config
        self._resolved = resolve(self._config)
        self._state_dict_stager = StateDictStager(
            pin_memory=self._resolved.use_pinned_memory,
            share_memory=self._resolved.use_shared_memory,
            lease=self._resolved.use_leases,
        )
        self._streams = streams.SideStreams()
        self._staging_executor: ThreadPoolExecutor | None = None
        if self._resolved.use_async_staging:
            self._staging_executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="stager-staging")
        self._staging_future: Future[None] | None = (
            None  # of the last stage(); without its result, which is the caller's
        )
        self._state = _State.OPEN

    def stage(self, state_dict: StateDict, **kwargs: Any) -> StateDict | Future[StateDict]:
        """Copy ``state_dict``.

        Args:
            state_dict: what to stage; any object that can be deep-copied.
            **kwargs: accepted and unused, as callers written for torch's stagers may pass some.

        Returns:
            The copy, or with ``use_async_staging`` a Future of it; until that resolves the state must not be changed.

        Raises:
            UnstageableError: (here or from the Future) names the key path of what cannot be copied.
            ClosedError: the stager was closed.
        """
        if self._state is _State.CLOSED:
            raise ClosedError("DefaultStager.stage() was called after close(); make a new stager")
        if self._staging_executor is None:
            return self._stage(state_dict)
        fence = self._streams.fence()  # here, on the caller's thread: NOTE [ Which stream copies what ]
        completion: Future[None] = Future()
        self._staging_future = completion
        staging = self._staging_executor.submit(self._stage_behind, state_dict, fence)
        staging.add_done_callback(partial(_settle, completion))
        return staging

    def _stage_behind(self, state_dict: StateDict, fence: streams.Fence | None) -> StateDict:
        if fence is None:
            return self._stage(state_dict)
        streams.enter(fence)
        memo = HookMemo()  # holds the sources of copies under way: freed memory would be given to the trainer
        staged: StateDict = self._state_dict_stager.stage(
            state_dict, non_blocking=self._resolved.use_non_blocking_copy, memo=memo
        )
        streams.wait(fence)
        return staged

    def _stage(self, state_dict: StateDict) -> StateDict:
        memo = HookMemo()
        non_blocking = self._resolved.use_non_blocking_copy
        staged: StateDict = self._state_dict_stager.stage(state_dict, non_blocking=non_blocking, memo=memo)
        if non_blocking:
            streams.wait_current()
        return staged

    def synchronize_staging(self) -> None:
        """Wait for the last ``stage()``; raises what it raised. Returns at once if staging is not asynchronous."""
        if self._staging_future is not None:
            self._staging_future.result()

    def release(self, staged: StateDict) -> int:
        """With leases: let the next ``stage()`` use this result's buffers though something still refers to them.

        Returns how many buffers were given back; 0 without leases.
        """
        return self._state_dict_stager.release(staged)

    def close(self) -> None:
        """Wait for staging under way, then give up the thread and the buffers. Results stay valid. Idempotent."""
        self._state = _State.CLOSED
        if self._staging_executor is not None:
            self._staging_executor.shutdown(wait=True)
        self._staging_future = None
        self._state_dict_stager.close()
        self._streams.close()

    def __enter__(self) -> DefaultStager:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _settle(completion: Future[None], staging: Future[StateDict]) -> None:
    """Pass on how staging ended, and not what it made: a reference here would keep a lease from ending."""
    error = CancelledError() if staging.cancelled() else staging.exception()
    if error is None:
        completion.set_result(None)
    else:
        completion.set_exception(error)
