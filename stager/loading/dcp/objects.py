"""Handing the objects of a checkpoint to a planner of DCP, which would unpickle anything."""

from __future__ import annotations

import io

from torch.distributed.checkpoint.planner import LoadPlanner, ReadItem

from stager.loading.pickles.unpickle import unpickle
from stager.workers.errors import StagerError, UsageError


def hand_over_object(planner: LoadPlanner, request: ReadItem, blob: bytes, path: str, allow_pickle: bool) -> None:
    """Let ``planner`` load an object if the ``weights_only`` rules allow it.

    Args:
        planner: of the load.
        request: the planner's request for the object.
        blob: the object as ``torch.save`` wrote it.
        path: of the checkpoint, for messages.
        allow_pickle: let the planner unpickle any object.

    Raises:
        UnsafePickleError: the ``weights_only`` rules do not allow the object.
        CorruptCheckpointError: the blob is not what ``torch.save`` writes.
        UsageError: the object cannot be loaded on this host, for example because a tensor's device is missing.
    """
    name = request.dest_index.fqn
    if not allow_pickle:
        unpickle(blob, name, path, allow_pickle=False)
    try:
        planner.load_bytes(request, io.BytesIO(blob))
    except (StagerError, Warning):
        raise
    except RuntimeError as error:  # torch raises this for a device that the host does not have
        raise UsageError(f"{name} in {path} cannot be loaded on this host: {error}") from error
