"""The interfaces of a stager, as ``dcp.async_save`` and torch's experimental checkpointers expect them."""

from __future__ import annotations

import abc
from concurrent.futures import Future
from typing import Any, Protocol, runtime_checkable

StateDict = dict[str, Any]


@runtime_checkable
class AsyncStager(Protocol):
    """A stager for ``dcp.async_save(..., async_stager=...)``.

    ``async_save`` calls, in this order: :meth:`stage`; then, if that returned a dict and not a Future,
    :meth:`synchronize_staging` when :attr:`should_synchronize_after_execute` is true. The caller closes the stager after
    its last save.
    """

    _synchronize_after_execute: bool = True

    @property
    def should_synchronize_after_execute(self) -> bool:
        """Whether ``async_save`` itself has to wait until the state may be changed."""
        return self._synchronize_after_execute

    def stage(self, state_dict: StateDict) -> Future[StateDict] | StateDict:
        """Return a copy, or a Future of one, that later changes to ``state_dict`` do not reach."""
        raise NotImplementedError(f"{type(self).__name__} must define stage()")

    def synchronize_staging(self) -> None:
        """Return when the state given to :meth:`stage` may be changed."""

    def close(self) -> None:
        """Release threads and buffers."""


class CheckpointStager(abc.ABC):
    """A stager for ``torch.distributed.checkpoint._experimental``'s checkpointers."""

    @abc.abstractmethod
    def stage(self, state_dict: StateDict, **kwargs: Any) -> StateDict | Future[StateDict]:
        """Return a copy, or a Future of one, that later changes to ``state_dict`` do not reach."""

    @abc.abstractmethod
    def close(self) -> None:
        """Release threads and buffers."""
