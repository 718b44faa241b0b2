"""Handing the objects of a checkpoint to a planner of DCP, which would unpickle anything."""

from __future__ import annotations

import io
from collections.abc import Sequence

from torch.distributed.checkpoint.planner import LoadPlanner, ReadItem

from stager.loading.pickles.unpickle import unpickle
from stager.workers.checkpoint.formats.safe_globals import allowed
from stager.workers.checkpoint.formats.torch_settings import torch_defaults
from stager.workers.errors import StagerError, UnloadableError


def hand_over_object(
    planner: LoadPlanner,
    request: ReadItem,
    blob: bytes,
    path: str,
    allow_pickle: bool,
    safe_globals: Sequence[str] = (),
) -> None:
    """Let ``planner`` load an object if the ``weights_only`` rules allow it.

    Args:
        planner: of the load.
        request: the planner's request for the object.
        blob: the object as ``torch.save`` wrote it.
        path: of the checkpoint, for messages.
        allow_pickle: let the planner unpickle any object.
        safe_globals: classes that these rules allow, beside plain data and what torch allows.

    Raises:
        UnsafePickleError: the ``weights_only`` rules do not allow the object.
        CorruptCheckpointError: the blob is not what ``torch.save`` writes.
        UnloadableError: the object cannot be made on this host, for example because a tensor's device is missing.
    """
    name = request.dest_index.fqn
    with torch_defaults():
        if not allow_pickle:
            unpickle(blob, name, path, allow_pickle=False, safe_globals=safe_globals)
        try:
            # The planner calls torch.load(), which under TORCH_FORCE_WEIGHTS_ONLY_LOAD has to know what is allowed.
            with allowed(safe_globals):
                planner.load_bytes(request, io.BytesIO(blob))
        except (StagerError, Warning):
            raise
        except Exception as error:  # the planner's code, the object's, or torch's: a device that the host does not have
            reason = str(error).partition("\n")[0]
            raise UnloadableError(
                name,
                f"its bytes in {path} cannot be made into an object on this host ({type(error).__name__}: {reason})",
            ) from error
