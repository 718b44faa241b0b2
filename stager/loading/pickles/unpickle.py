"""Unpickling the objects of a checkpoint, under ``weights_only`` rules unless the user allows any pickle.

torch's own functions below ``torch.load`` are called, because settings of the process change what ``torch.load`` does: the
variables TORCH_FORCE_WEIGHTS_ONLY_LOAD and TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD, and ``torch.utils.serialization.config.load``.
"""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import IO, Any

import torch
from torch import _weights_only_unpickler, serialization

from stager.loading.pickles.archive_check import check_archive
from stager.workers.checkpoint.formats.safe_globals import allowed, reason_of
from stager.workers.errors import CorruptCheckpointError, UnloadableError, UnsafePickleError

_torch: Any = serialization


def unpickle(blob: bytes, name: str, path: str, allow_pickle: bool, safe_globals: Sequence[str] = ()) -> Any:
    """Load an object from its archive, with its tensors on the CPU.

    Args:
        blob: an archive of ``torch.save``. Its bytes are those that were saved: their hash was checked.
        name: key path of the object, for messages.
        path: of the checkpoint, for messages.
        allow_pickle: unpickle any object; otherwise only what the ``weights_only`` rules allow.
        safe_globals: classes that these rules allow, beside plain data and what torch allows.

    Raises:
        UnsafePickleError: the ``weights_only`` rules do not allow the object.
        UnloadableError: the object cannot be made here, for example because its class cannot be imported.
    """
    try:
        check_archive(io.BytesIO(blob), len(blob), name, path, pickles=not allow_pickle)
    except CorruptCheckpointError as error:
        raise UnsafePickleError(f"{error}; nothing was changed. {_PERMISSION}") from error
    try:
        return load_archive(io.BytesIO(blob), allow_pickle, safe_globals)
    except Warning:  # the user turned warnings into errors
        raise
    except pickle.UnpicklingError as error:
        if allow_pickle:
            raise _unloadable(name, path, error) from error
        reason = reason_of(error, blob, safe_globals)
        raise UnsafePickleError(
            f"{name} in {path} is a pickled object that could run code when loaded ({reason}); nothing was changed. "
            + _PERMISSION
        ) from error
    except Exception as error:  # whatever the object's own code raises
        raise _unloadable(name, path, error) from error


_PERMISSION = (
    "If you trust the origin of this checkpoint, use load(..., allow_pickle=True), or allow the class by the setting "
    "loading.safe_globals: [package.module.Class] or by torch.serialization.add_safe_globals([...])"
)


def _unloadable(name: str, path: str, error: Exception) -> UnloadableError:
    return UnloadableError(
        name,
        f"its bytes in {path} are intact, but the object cannot be made here ({type(error).__name__}: {error}); "
        "no older checkpoint was tried. Make its class importable as it was when it was saved, or load the other "
        "values with load(keys=...)",
    )


def load_archive(
    source: IO[bytes] | str, allow_pickle: bool, safe_globals: Sequence[str] = (), map_location: str = "cpu"
) -> Any:
    """Load an archive that was checked, as ``torch.load`` does without any setting.

    Args:
        source: an open file, or a path.
        allow_pickle, safe_globals: see :func:`unpickle`.

    Raises:
        pickle.UnpicklingError: the ``weights_only`` rules do not allow it, or it is no pickle.
        Exception: anything, from the objects in it.
    """
    rules: AbstractContextManager[None] = nullcontext() if allow_pickle else allowed(safe_globals)
    unpickler = pickle if allow_pickle else _weights_only_unpickler
    # torch makes sparse tensors on the default device. It warns of what its own code for quantized tensors does.
    with torch.device("cpu"), warnings.catch_warnings(), rules:
        warnings.filterwarnings("ignore", "TypedStorage is deprecated")
        with _torch._open_zipfile_reader(source) as archive:
            return _torch._load(archive, map_location, unpickler, encoding="utf-8")


def load_unverified(
    source: IO[bytes] | str, name: str, path: str, allow_pickle: bool, map_location: str = "cpu"
) -> Any:
    """Load an archive whose bytes nobody has verified: of another library. Arguments as for :func:`unpickle`.

    Raises:
        UnsafePickleError: the ``weights_only`` rules do not allow it.
        CorruptCheckpointError: it cannot be loaded, for whatever reason: it may be damaged.
        UnloadableError: one of its classes cannot be imported.
    """
    try:
        return load_archive(source, allow_pickle, (), map_location)
    except Warning:
        raise
    except pickle.UnpicklingError as error:
        if allow_pickle:
            raise CorruptCheckpointError(path, f"{name} cannot be unpickled: {error}") from error
        reason = str(error).partition("\n")[0]
        raise UnsafePickleError(
            f"{name} in {path} is a pickled object that could run code when loaded ({reason}); nothing was changed. "
            + _PERMISSION
        ) from error
    except (ImportError, AttributeError) as error:
        if allow_pickle:
            raise _unloadable(name, path, error) from error
        raise CorruptCheckpointError(path, f"{name} cannot be read: {error}") from error
    except Exception as error:  # a hostile pickle can raise anything
        raise CorruptCheckpointError(path, f"{name} cannot be read: {error!r}") from error
