"""Objects of a checkpoint on their way to a planner, which unpickles anything."""

from __future__ import annotations

import io

from torch.distributed.checkpoint.planner import LoadPlanner, ReadItem

from stager.loading.pickles.unpickle import unpickle
from stager.workers.errors import StagerError, UsageError


def hand_over_object(planner: LoadPlanner, request: ReadItem, blob: bytes, path: str, allow_pickle: bool) -> None:
    """Let ``planner`` load an object, when ``weights_only`` rules allow it.

    Args:
        path: of the checkpoint, for messages.
        allow_pickle: without asking.

    Raises:
        UnsafePickleError: it is more than ``weights_only`` allows.
        CorruptCheckpointError: it is not what ``torch.save`` writes.
        UsageError: it cannot be loaded here, a tensor of a device that is not there for one.
    """
    name = request.dest_index.fqn
    if not allow_pickle:
        unpickle(blob, name, path, allow_pickle=False)
    try:
        planner.load_bytes(request, io.BytesIO(blob))
    except (StagerError, Warning):
        raise
    except RuntimeError as error:  # torch's word for a device that is not there
        raise UsageError(f"{name} in {path} cannot be loaded here: {error}") from error
