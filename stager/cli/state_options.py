"""Options that describe a job before it runs: its state, its ranks and its hosts. ``plan`` and ``init`` share them."""

from __future__ import annotations

import os
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stager.planning import Host, JobShape, StateSource


class OptimizerName(str, Enum):
    """As :class:`stager.planning.optimizers.OptimizerKind`, whose module imports torch."""

    ADAMW = "adamw"
    ADAM = "adam"
    SGD = "sgd"
    NONE = "none"


def job_of_options(ranks: int | None, local_world_size: int | None, shards: int) -> JobShape:
    """The ranks of the job, by default those that the environment says a host has."""
    from stager.planning import JobShape
    from stager.ranks.launch import local_world_size as of_environment
    from stager.workers.errors import UsageError

    local = local_world_size or min(of_environment(os.environ), ranks or 1 << 30)
    total = ranks or max(local, shards)
    if local > total:
        raise UsageError(f"--local-world-size {local} is more than --ranks {total}")
    if total % shards:
        raise UsageError(f"--ranks {total} is not a multiple of --shards {shards}")
    return JobShape(num_ranks=total, local_world_size=local, num_shards=shards)


def host_of_options(memory: str | None, cores: int | None) -> Host:
    """A host of the job, by default this one."""
    import resource

    from stager.config.host import available_memory_bytes, usable_cores
    from stager.config.sizes import parse_bytes
    from stager.doctor.probes import soft_and_hard_limit
    from stager.planning import Host
    from stager.workers.errors import UsageError

    try:
        available = available_memory_bytes() if memory is None else parse_bytes(memory)
    except ValueError as error:
        raise UsageError(f"--memory {memory}: {error}") from error
    return Host(available, cores or usable_cores(), soft_and_hard_limit(resource.RLIMIT_NOFILE)[0])


def state_of_options(
    option: str,
    module: str | None,
    meta: bool,
    params: str | None,
    dtype: str,
    tensors: int,
    optimizer: OptimizerName | None,
) -> StateSource:
    """The state that ``module`` makes, or that has ``params`` parameters; one of them is given.

    Args:
        option: the option that ``module`` comes from, for messages.
    """
    from stager.planning import from_callable, from_numbers
    from stager.planning.optimizers import OptimizerKind

    kind = None if optimizer is None else OptimizerKind(optimizer.value)
    if module is not None:
        return from_callable(module, meta, kind, option=option)
    assert params is not None
    return from_numbers(_count(params), dtype, kind or OptimizerKind.NONE, tensors)


def _count(text: str) -> int:
    """Parse a number of parameters such as ``124M`` or ``70B``."""
    from stager.workers.errors import UsageError

    factor = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}.get(text[-1:].upper(), 1)
    digits = text if factor == 1 else text[:-1]
    try:
        count = round(float(digits) * factor)
    except (ValueError, OverflowError):
        count = 0
    if count < 1:
        raise UsageError(f"--params {text} is not a number of parameters; write it as 124000000, 124M or 70B")
    return count
