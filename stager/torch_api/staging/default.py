"""``DefaultStager``: one class for ``torch.distributed.checkpoint.staging``'s and ``_experimental.staging``'s."""

from __future__ import annotations

from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from enum import Enum
from functools import partial
from typing import Any

from stager.torch_api.staging import streams
from stager.torch_api.staging.contracts import AsyncStager, CheckpointStager, StateDict
from stager.torch_api.staging.staging_options import CheckpointStagerConfig, StagingOptions, auto_options, resolve
from stager.torch_api.staging.state_dict_stager import StateDictStager
from stager.workers.errors import ClosedError
from stager.workers.offload.hook_memo import HookMemo


class _State(Enum):
    OPEN = "open"
    CLOSED = "closed"


class DefaultStager(CheckpointStager, AsyncStager):
    """Stages state dicts, in the calling thread or in one background thread.

    Not thread-safe. Close it after the last save, or use it as a context manager.

    Without leases (the default, as in torch) the next ``stage()`` of the same tensors overwrites the result of this one.
    Wait for the upload of a save before the next ``stage()``, or set ``StagingOptions(use_leases=True)``.

    Args:
        config: ``StagingOptions``, ``CheckpointStagerConfig`` or torch's own classes. Default: every field is ``"auto"``.

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
        self._streams = streams.StagingStreams()
        self._staging_executor: ThreadPoolExecutor | None = None
        if self._resolved.use_async_staging:
            self._staging_executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="stager-staging")
        # Of the last stage(). It has no result: a reference to the staged state here would keep its lease from ending.
        self._staging_future: Future[None] | None = None
        self._state = _State.OPEN

    def stage(self, state_dict: StateDict, **kwargs: Any) -> StateDict | Future[StateDict]:
        """Copy ``state_dict``.

        Args:
            state_dict: what to stage; any object that can be deep-copied.
            **kwargs: ignored; callers written for torch's stagers may pass some.

        Returns:
            The copy, or with ``use_async_staging`` a Future of it; until that resolves the state must not be changed.

        Raises:
            UnstageableError: a value cannot be copied; names its key path. Raised here or by the Future.
            ClosedError: the stager was closed.
        """
        if self._state is _State.CLOSED:
            raise ClosedError("DefaultStager.stage() was called after close(); make a new stager")
        if self._staging_executor is None:
            memo = HookMemo()  # keeps the sources until the copies are done
            staged = self._copy(state_dict, memo)
            if self._resolved.use_non_blocking_copy:
                streams.wait_current()
            return staged
        fence = self._streams.fence()  # in the caller's thread: NOTE [ Which stream copies what ]
        completion: Future[None] = Future()
        self._staging_future = completion
        staging = self._staging_executor.submit(self._stage_behind, state_dict, fence)
        staging.add_done_callback(partial(_settle, completion))
        return staging

    def _stage_behind(self, state_dict: StateDict, fence: streams.Fence) -> StateDict:
        fence.enter()
        memo = HookMemo()  # keeps the sources until the copies are done: freed memory would be given to the trainer
        staged = self._copy(state_dict, memo)
        fence.wait()
        return staged

    def _copy(self, state_dict: StateDict, memo: HookMemo) -> StateDict:
        staged: StateDict = self._state_dict_stager.stage(
            state_dict, non_blocking=self._resolved.use_non_blocking_copy, memo=memo
        )
        return staged

    def synchronize_staging(self) -> None:
        """Wait for the last ``stage()``, and raise what it raised. Returns at once if staging is not asynchronous."""
        if self._staging_future is not None:
            self._staging_future.result()

    def release(self, staged: StateDict) -> int:
        """End the lease of a result now: the next ``stage()`` may overwrite its buffers, even if it is still referred to.

        Returns the number of buffers that were given back; 0 without leases.
        """
        return self._state_dict_stager.release(staged)

    def close(self) -> None:
        """Wait for the staging in progress, then release the thread and the buffers. Results stay valid. Idempotent."""
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
    """Pass on how staging ended, but not its result: a reference to that would keep its lease from ending."""
    error = CancelledError() if staging.cancelled() else staging.exception()
    if error is None:
        completion.set_result(None)
    else:
        completion.set_exception(error)
