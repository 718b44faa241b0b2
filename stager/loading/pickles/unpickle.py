"""Unpickling the objects of a checkpoint, under ``weights_only`` rules unless the user allows any pickle."""

from __future__ import annotations

import io
import pickle
import warnings
from typing import IO, Any

import torch

from stager.loading.pickles.archive_check import check_archive
from stager.workers.errors import CorruptCheckpointError, UnsafePickleError, UsageError


def unpickle(blob: bytes, name: str, path: str, allow_pickle: bool) -> Any:
    """Load the object that ``torch.save`` wrote as ``blob``, with its tensors on the CPU.

    Args:
        blob: an archive of ``torch.save``.
        name: of the object, for messages.
        path: of the checkpoint, for messages.
        allow_pickle: unpickle any object; otherwise only what the ``weights_only`` rules allow.

    Raises:
        UnsafePickleError: the ``weights_only`` rules do not allow the object.
        CorruptCheckpointError: the blob is not what ``torch.save`` writes.
        UsageError: the object's class cannot be imported.
    """
    check_archive(io.BytesIO(blob), len(blob), name, path, pickles=not allow_pickle)
    return load_archive(io.BytesIO(blob), name, path, allow_pickle)


def load_archive(source: IO[bytes] | str, name: str, path: str, allow_pickle: bool, map_location: str = "cpu") -> Any:
    """Load an archive that was checked, an open file or a path. For the rest see :func:`unpickle` and ``torch.load``."""
    try:
        # torch makes sparse tensors on the default device. It warns of what its own code for quantized tensors does.
        with torch.device("cpu"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "TypedStorage is deprecated")
            return torch.load(source, weights_only=not allow_pickle, map_location=map_location)
    except Warning:  # the user turned warnings into errors; the checkpoint is not damaged
        raise
    except pickle.UnpicklingError as error:
        if not allow_pickle:
            raise UnsafePickleError(_refusal(name, path, error)) from error
        raise CorruptCheckpointError(path, f"{name} cannot be unpickled: {error}") from error
    except (ImportError, AttributeError) as error:
        if allow_pickle:
            raise UsageError(
                f"{name} in {path} cannot be unpickled, because its class cannot be imported: {error}"
            ) from error
        raise CorruptCheckpointError(path, f"{name} cannot be read: {error}") from error
    except Exception as error:  # a hostile pickle can raise anything
        raise CorruptCheckpointError(path, f"{name} cannot be read: {error!r}") from error


def _refusal(name: str, path: str, error: Exception) -> str:
    reason = str(error).splitlines()[0] if str(error) else repr(error)
    return (
        f"{name} in {path} is a pickled object that could run code when loaded ({reason}); nothing was changed. "
        "If you trust the origin of this checkpoint, use load(..., allow_pickle=True), or allow the class by "
        "torch.serialization.add_safe_globals([...])"
    )
