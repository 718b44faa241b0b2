"""``DefaultStager`` and its options: one class for ``torch.distributed.checkpoint.staging``'s and ``_experimental``'s."""

from __future__ import annotations

from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal

from stager.config.arguments import shown
from stager.torch_api.staging.contracts import AsyncStager, CheckpointStager, StateDict
from stager.torch_api.staging.state_dict_stager import StateDictStager
from stager.workers.device import accelerator
from stager.workers.device.accelerator import devices_in_use
from stager.workers.device.streams import SideStreams
from stager.workers.errors import ArgumentError, ClosedError
from stager.workers.offload.hook_memo import HookMemo

Choice = bool | Literal["auto"]


@dataclass
class StagingOptions:
    """Options of :class:`DefaultStager`, as in ``torch.distributed.checkpoint.staging``.

    The defaults are torch's and need CUDA. ``"auto"`` for a field means: if this host can do it. ``DefaultStager()`` without
    options uses :func:`auto_options`, in which every field is ``"auto"``.

    Attributes:
        use_pinned_memory: page-lock staged memory. True without CUDA warns and is ignored. auto: with CUDA.
        use_shared_memory: stage into shared memory, sent to other processes without a copy. auto: yes.
        use_async_staging: copy in a background thread; ``stage()`` then returns a Future, and the state must not
            be changed before it resolves. auto: with an accelerator; on the CPU ``stage()`` returns when all is copied.
        use_non_blocking_copy: queue device copies and wait for all of them once. True without an accelerator is an
            ``AssertionError``. auto: with an accelerator.
        use_leases: each result owns its buffers until it is dropped or released, so that a later ``stage()`` cannot
            change it; memory for as many results as are alive. Default False, torch's behaviour. Not in torch.
    """

    use_pinned_memory: Choice = True
    use_shared_memory: Choice = True
    use_async_staging: Choice = True
    use_non_blocking_copy: Choice = True
    use_leases: bool = False


@dataclass
class CheckpointStagerConfig(StagingOptions):
    """The same options under the name that ``torch.distributed.checkpoint._experimental`` gives them."""


def auto_options() -> StagingOptions:
    """Return options that are all ``"auto"``: what ``DefaultStager()`` without options uses."""
    return StagingOptions("auto", "auto", "auto", "auto")


class DefaultStager(CheckpointStager, AsyncStager, AbstractContextManager["DefaultStager"]):
    """Stages state dicts, in the calling thread or in one background thread.

    Not thread-safe. Close it after the last save, or use it as a context manager.

    Without leases (the default, as in torch) the next ``stage()`` of the same tensors overwrites the result of this one.
    Wait for the upload of a save before the next ``stage()``, or set ``StagingOptions(use_leases=True)``.

    Args:
        config: ``StagingOptions``, ``CheckpointStagerConfig`` or torch's own classes. Default: every field is ``"auto"``.

    Raises:
        ArgumentError: ``config`` is something else: a dict, for example.
        AssertionError: an option needs an accelerator and there is none.
        TypeError: an option is neither a bool nor "auto".
    """

    def __init__(self, config: StagingOptions | CheckpointStagerConfig | None = None) -> None:
        self._config = auto_options() if config is None else _check(config)
        has_accelerator = accelerator.current() is not None
        self._use_async_staging = _decide(self._config, "use_async_staging", has_accelerator)
        self._use_non_blocking_copy = _decide(self._config, "use_non_blocking_copy", has_accelerator)
        if self._use_non_blocking_copy and not has_accelerator:
            raise AssertionError(
                "use_non_blocking_copy=True, the default of StagingOptions, needs an accelerator, and torch sees none: "
                "copies between CPU tensors cannot be queued. Pass use_non_blocking_copy=False beside your other options; "
                "use_pinned_memory may stay, and is ignored here. DefaultStager() without options chooses all of them."
            )
        self._state_dict_stager = StateDictStager(
            pin_memory=_decide(self._config, "use_pinned_memory", has_accelerator),
            share_memory=_decide(self._config, "use_shared_memory", True),
            lease=bool(getattr(self._config, "use_leases", False)),  # torch's own options class has no such field
        )
        # Starts its thread with the first asynchronous stage().
        self._staging_executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="stager-staging")
        # Of the last stage(). It has no result: a reference to the staged state here would keep its lease from ending.
        self._staging_future: Future[None] | None = None
        self._closed = False

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
        if self._closed:
            raise ClosedError("DefaultStager.stage() was called after close(); make a new stager")
        # In the caller's thread, which is the trainer's: NOTE [ Which stream copies what ] in workers/device/streams.py.
        streams = SideStreams(devices_in_use())
        if not self._use_async_staging:
            return self._copy(state_dict, streams)
        self._staging_future = Future()
        staging = self._staging_executor.submit(self._copy, state_dict, streams)
        staging.add_done_callback(partial(_settle, self._staging_future))
        return staging

    def _copy(self, state_dict: StateDict, streams: SideStreams) -> StateDict:
        memo = HookMemo()  # keeps the sources until the copies are done: freed memory would be given to the trainer
        with streams.stream():
            staged: StateDict = self._state_dict_stager.stage(state_dict, self._use_non_blocking_copy, memo=memo)
        streams.synchronize()
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
        self._closed = True
        self._staging_executor.shutdown()
        self._staging_future = None
        self._state_dict_stager.close()

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _check(config: object) -> Any:
    """Take stager's options, or torch's, which have the same fields.

    Raises:
        ArgumentError: anything else.
    """
    if all(hasattr(config, one.name) for one in fields(StagingOptions) if one.name != "use_leases"):
        return config
    given = ", ".join(f"{key}={value!r}" for key, value in config.items()) if isinstance(config, dict) else "..."
    raise ArgumentError(
        f"config must be StagingOptions, got {shown(config)}; write DefaultStager(StagingOptions({given}))"
    )


def _decide(options: StagingOptions, name: str, automatic: bool) -> bool:
    choice = getattr(options, name)
    if choice == "auto":
        return automatic
    if not isinstance(choice, bool):
        raise TypeError(f'{name} must be True, False or "auto", not {choice!r}')
    return choice


def _settle(completion: Future[None], staging: Future[StateDict]) -> None:
    """Pass on how staging ended, but not its result: a reference to that would keep its lease from ending."""
    error = CancelledError() if staging.cancelled() else staging.exception()
    if error is None:
        completion.set_result(None)
    else:
        completion.set_exception(error)
