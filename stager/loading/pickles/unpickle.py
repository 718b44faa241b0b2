"""Objects out of a checkpoint, without running its code unless the user allows it."""

from __future__ import annotations

import io
import pickle
import warnings
from typing import IO, Any

import torch

from stager.loading.pickles.archive_check import check_archive
from stager.workers.errors import CorruptCheckpointError, UnsafePickleError, UsageError


def unpickle(blob: bytes, name: str, path: str, allow_pickle: bool) -> Any:
    """The object that ``torch.save`` wrote as ``blob``; its tensors on the CPU.

    Args:
        name, path: of the object and the checkpoint, for messages.
        allow_pickle: unpickle anything; otherwise only what ``weights_only`` allows.

    Raises:
        UnsafePickleError: it is more than ``weights_only`` allows.
        CorruptCheckpointError: it is not what ``torch.save`` writes.
        UsageError: its class cannot be imported here.
    """
    check_archive(io.BytesIO(blob), len(blob), name, path, pickles=not allow_pickle)
    return load_archive(io.BytesIO(blob), name, path, allow_pickle)


def load_archive(source: IO[bytes] | str, name: str, path: str, allow_pickle: bool, map_location: str = "cpu") -> Any:
    """The same for an archive that was checked: an open file, or a path. ``map_location`` as for ``torch.load``."""
    try:
        # A sparse tensor is put together on the default device. The warning is torch's of its own way with quantized ones.
        with torch.device("cpu"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "TypedStorage is deprecated")
            return torch.load(source, weights_only=not allow_pickle, map_location=map_location)
    except Warning:  # the user made warnings errors: that is no damage
        raise
    except pickle.UnpicklingError as error:
        if not allow_pickle:
            raise UnsafePickleError(_refusal(name, path, error)) from error
        raise CorruptCheckpointError(path, f"{name} cannot be unpickled: {error}") from error
    except (ImportError, AttributeError) as error:
        if allow_pickle:
            raise UsageError(f"{name} in {path} cannot be unpickled here, its class is not found: {error}") from error
        raise CorruptCheckpointError(path, f"{name} cannot be read: {error}") from error
    except Exception as error:  # a hostile pickle can fail in any way
        raise CorruptCheckpointError(path, f"{name} cannot be read: {error!r}") from error


def _refusal(name: str, path: str, error: Exception) -> str:
    reason = str(error).splitlines()[0] if str(error) else repr(error)
    return (
        f"{name} in {path} is a pickled object that could run code when loaded ({reason}); nothing was changed. "
        "If you trust where this checkpoint comes from: load(..., allow_pickle=True), or "
        "torch.serialization.add_safe_globals([...]) for its class"
    )
