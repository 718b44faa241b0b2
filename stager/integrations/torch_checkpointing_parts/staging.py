"""``StagerCheckpointStager``: torch_checkpointing's stager, over stager's engine."""

from __future__ import annotations

import contextvars
import logging
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any

from torch_checkpointing.logging_utils import EventLogger, EventType
from torch_checkpointing.staging import CheckpointStager, CheckpointStagerConfig
from torch_checkpointing.utils import set_thread_name_safe

from stager.config.arguments import shown
from stager.torch_api.staging.state_dict_stager import StateDictStager
from stager.workers.device import accelerator
from stager.workers.device.accelerator import devices_in_use
from stager.workers.device.streams import SideStreams
from stager.workers.errors import ArgumentError, ClosedError
from stager.workers.faults import point
from stager.workers.offload.hook_memo import HookMemo

logger = logging.getLogger("torch_checkpointing.staging")  # where a program that collects its metrics looks for them


class StagerCheckpointStager(CheckpointStager):
    """Stages payloads as ``torch_checkpointing.DefaultStager`` does: the same arguments, defaults, results and metrics.

    A result is overwritten by the next ``stage()``, which uses its buffers again; so torch_checkpointing begins that only
    when the result is written. Not thread-safe.

    Args:
        config: torch_checkpointing's own class; None: its defaults.
        staging_executor: in which ``stage()`` copies, for several stagers. ``close()`` does not shut it down. None: a thread
            of its own.

    Raises:
        ArgumentError: ``config`` is something else; or ``staging_executor`` is given with ``use_async_staging=False``.
        AssertionError: ``use_non_blocking_copy`` is set, and there is no accelerator.
    """

    def __init__(
        self, config: CheckpointStagerConfig | None = None, *, staging_executor: ThreadPoolExecutor | None = None
    ) -> None:
        made = EventLogger()
        self._config = CheckpointStagerConfig() if config is None else config
        if not isinstance(self._config, CheckpointStagerConfig):
            raise ArgumentError(f"config must be torch_checkpointing's CheckpointStagerConfig, got {shown(config)}")
        if staging_executor is not None and not self._config.use_async_staging:
            raise ArgumentError(
                "staging_executor is given, and use_async_staging is False, so that nothing would run in it; take one of "
                "them out"
            )
        if self._config.use_non_blocking_copy and accelerator.current() is None:
            raise AssertionError(
                "use_non_blocking_copy=True needs an accelerator, and torch sees none: copies between CPU tensors cannot be "
                "queued; leave it out, and it is set where it can be"
            )
        self._state_dict_stager = StateDictStager(
            pin_memory=self._config.use_pinned_memory, share_memory=self._config.use_shared_memory, lease=True
        )
        self._staged: Any = None
        self._staging: Future[Any] | None = None  # the last one
        self._own_executor = None
        if self._config.use_async_staging and staging_executor is None:
            self._own_executor = ThreadPoolExecutor(1, thread_name_prefix=self._config.thread_name)
        self._executor = staging_executor or self._own_executor
        self._closed = False
        self._log(made(EventType.LOG_METRIC, metric_name=self._metric("initialize_stream"), end_to_end=True))

    def stage(self, state_dict: Any, keys_not_requiring_copy: Collection[str] = ()) -> Any:
        """Copy a payload.

        Args:
            state_dict: any object that can be deep-copied; a mapping if there are ``keys_not_requiring_copy``.
            keys_not_requiring_copy: whose values are passed on as they are. Keys that ``state_dict`` lacks are ignored.

        Returns:
            The copy, of the same type and with the same keys; with ``use_async_staging`` a Future of it. Until that resolves
            the payload must not be changed.

        Raises:
            UnstageableError: a value cannot be copied; names its key path. Raised here or by the Future.
            ClosedError: the stager was closed.
        """
        if self._closed:
            raise ClosedError("StagerCheckpointStager.stage() was called after close(); make a new stager")
        # In the caller's thread, which is the trainer's: NOTE [ Which stream copies what ] in workers/device/streams.py.
        streams = SideStreams(devices_in_use())
        if self._executor is None:
            return self._stage(state_dict, keys_not_requiring_copy, streams)
        # The caller's logging context (torch_checkpointing's, with the step) goes along.
        run = partial(
            contextvars.copy_context().run, self._stage_in_thread, state_dict, keys_not_requiring_copy, streams
        )
        self._staging = self._executor.submit(run)
        return self._staging

    def _stage_in_thread(self, state_dict: Any, passed_on: Collection[str], streams: SideStreams) -> Any:
        set_thread_name_safe(self._config.thread_name)
        return self._stage(state_dict, passed_on, streams)

    def _stage(self, state_dict: Any, passed_on: Collection[str], streams: SideStreams) -> Any:
        begun = EventLogger()
        self._log(begun(EventType.CHECKPOINT_STAGING_START))
        before, self._staged = self._staged, None  # if this fails, there is no result
        if before is not None:
            self._state_dict_stager.release(before)
        to_copy = state_dict
        if passed_on:
            to_copy = state_dict.copy()
            for key in passed_on:
                to_copy.pop(key, None)
        memo = HookMemo()  # keeps the sources until the copies are done: freed memory would be given to the trainer
        with streams.stream():
            staged = self._state_dict_stager.stage(to_copy, self._config.use_non_blocking_copy, memo=memo)
        streams.synchronize()
        for key in passed_on:
            if key in state_dict:
                staged[key] = state_dict[key]
        self._log(begun(EventType.LOG_METRIC, metric_name=self._metric("e2e"), end_to_end=True))
        waited = f"{self._config.metric_prefix}.execute.subprocess_comm.wait_for_tensor_copy.latency_ms"
        self._log(begun(EventType.CHECKPOINT_STAGING_END, metric_name=waited))
        point("save.copied")
        self._staged = staged
        return staged

    def get_staged_state_dict(self) -> Any:
        """Return the result of the last ``stage()``; None: there was none yet, or it failed."""
        return self._staged

    def pinned_num_bytes(self) -> int:
        """Return how many bytes of page-locked memory it holds."""
        return self._state_dict_stager.pinned_num_bytes()

    def close(self) -> None:
        """Wait for the staging in progress, then release the thread and the buffers. Results stay valid. Idempotent."""
        self._closed = True
        if self._staging is not None:
            wait([self._staging])  # in the caller's executor, too: it uses the buffers
        if self._own_executor is not None:
            self._own_executor.shutdown()
        self._staged = self._staging = None  # or the memory of the last result would stay page-locked
        self._state_dict_stager.close()

    def _metric(self, name: str) -> str:
        return f"{self._config.metric_prefix}.staging.{name}.latency_ms"

    def _log(self, event: dict[str, Any]) -> None:
        logger.info("staging for torch_checkpointing", extra=event)
