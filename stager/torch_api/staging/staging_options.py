"""The options of a stager: two dataclasses with the same fields, because torch has two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Choice = bool | Literal["auto"]


@dataclass
class StagingOptions:
    """Options of :class:`~stager.torch_api.staging.DefaultStager`, as in ``torch.distributed.checkpoint.staging``.

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


@dataclass(frozen=True)
class ResolvedOptions:
    """Options with every ``"auto"`` decided for this host."""

    use_pinned_memory: bool
    use_shared_memory: bool
    use_async_staging: bool
    use_non_blocking_copy: bool
    use_leases: bool


def auto_options() -> StagingOptions:
    """Return options that are all ``"auto"``: what ``DefaultStager()`` without options uses."""
    return StagingOptions("auto", "auto", "auto", "auto")


def resolve(options: StagingOptions) -> ResolvedOptions:
    """Decide the ``"auto"`` fields for this host.

    Raises:
        AssertionError: an option needs an accelerator and there is none; torch raises the same.
        TypeError: a field is neither a bool nor "auto".
    """
    accelerator = torch.accelerator.is_available()
    resolved = ResolvedOptions(
        use_pinned_memory=_decide("use_pinned_memory", options.use_pinned_memory, torch.cuda.is_available()),
        use_shared_memory=_decide("use_shared_memory", options.use_shared_memory, True),
        use_async_staging=_decide("use_async_staging", options.use_async_staging, accelerator),
        use_non_blocking_copy=_decide("use_non_blocking_copy", options.use_non_blocking_copy, accelerator),
        use_leases=bool(getattr(options, "use_leases", False)),  # torch's own options class has no such field
    )
    if resolved.use_non_blocking_copy and not accelerator:
        raise AssertionError(
            "use_non_blocking_copy=True needs an accelerator, and torch sees none: copies between CPU tensors cannot be "
            'queued. Set it to False or "auto" (DefaultStager() without options does).'
        )
    return resolved


def _decide(name: str, choice: object, automatic: bool) -> bool:
    if choice == "auto":
        return automatic
    if not isinstance(choice, bool):
        raise TypeError(f'{name} must be True, False or "auto", not {choice!r}')
    return choice
