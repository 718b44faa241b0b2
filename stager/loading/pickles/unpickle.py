"""Unpickling the objects of a checkpoint, under ``weights_only`` rules unless the user allows any pickle.

torch's own functions below ``torch.load`` are called, because settings of the process change what ``torch.load`` does: the
variables TORCH_FORCE_WEIGHTS_ONLY_LOAD and TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD. ``torch_defaults()`` puts other settings aside,
once for all objects of a checkpoint.
"""

from __future__ import annotations

import io
import pickle
import warnings
import zipfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import IO, Any

from torch import _weights_only_unpickler, serialization

from stager.loading.pickles.archive_check import check_archive
from stager.loading.pickles.plain_pickle import NOT_PLAIN, plain_value
from stager.workers.checkpoint.formats.safe_globals import allowed, reason_of
from stager.workers.checkpoint.formats.torch_settings import torch_defaults
from stager.workers.errors import ConfigError, CorruptCheckpointError, UnloadableError, UnsafePickleError

_torch: Any = serialization


def unpickle(blob: bytes, name: str, path: str, allow_pickle: bool, safe_globals: Sequence[str] = ()) -> Any:
    """Load an object from its archive, with its tensors on the CPU. To be called under ``torch_defaults()``.

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
        check_archive(io.BytesIO(blob), len(blob), name, path, pickles=False)
        if (value := plain_value(blob)) is not NOT_PLAIN:
            return value
        if not allow_pickle:
            check_archive(io.BytesIO(blob), len(blob), name, path)
    except CorruptCheckpointError as error:
        raise UnsafePickleError(f"{error}; nothing was changed. {_PERMISSION}") from error
    try:
        return load_archive(io.BytesIO(blob), allow_pickle, safe_globals)
    except (Warning, ConfigError):  # the user turned warnings into errors; a name in safe_globals is wrong
        raise
    except pickle.UnpicklingError as error:
        if allow_pickle:
            raise _unloadable(name, path, error) from error
        reason = reason_of(error, io.BytesIO(blob), safe_globals)
        raise UnsafePickleError(
            f"{name} in {path} is a pickled object that could run code when loaded ({reason}); nothing was changed. "
            + _PERMISSION
        ) from error
    except Exception as error:  # whatever the object's own code raises
        raise _unloadable(name, path, error) from error


_PERMISSION = (
    "If you trust the origin of this checkpoint, load it with allow_pickle=True (load() and load_checkpoint() take it, "
    "stager export has --allow-pickle), or allow the class by the setting loading.safe_globals: [package.module.Class], by "
    "load_checkpoint(..., safe_globals=[...]), or by torch.serialization.add_safe_globals([...])"
)


def _unloadable(name: str, path: str, error: Exception) -> UnloadableError:
    where = "" if name == path else f" in {path}"
    return UnloadableError(
        name,
        f"its bytes{where} are intact, but the object cannot be made here ({type(error).__name__}: {error}); "
        "no older checkpoint was tried. Make its class importable as it was when it was saved, or load the other "
        "values with load(keys=...)",
    )


def load_archive(
    source: IO[bytes] | str, allow_pickle: bool, safe_globals: Sequence[str] = (), map_location: str = "cpu"
) -> Any:
    """Load an archive that was checked, as ``torch.load`` does. To be called under ``torch_defaults()``.

    Args:
        source: an open file, or a path.
        allow_pickle, safe_globals: see :func:`unpickle`.

    Raises:
        pickle.UnpicklingError: the ``weights_only`` rules do not allow it, or it is no pickle.
        Exception: anything, from the objects in it.
    """
    rules: AbstractContextManager[None] = nullcontext() if allow_pickle else allowed(safe_globals)
    unpickler = pickle if allow_pickle else _weights_only_unpickler
    # torch warns of what its own code for quantized tensors does.
    with warnings.catch_warnings(), rules:
        warnings.filterwarnings("ignore", "TypedStorage is deprecated")
        with _torch._open_zipfile_reader(source) as archive:
            return _torch._load(archive, map_location, unpickler, encoding="utf-8")


def load_unverified(
    source: IO[bytes] | str,
    path: str,
    allow_pickle: bool,
    map_location: str = "cpu",
    safe_globals: Sequence[str] = (),
    load: Callable[..., Any] = load_archive,
) -> Any:
    """Load a file whose bytes nobody has verified: of another library. Other arguments as for :func:`unpickle`.

    Args:
        path: of the file, for messages.
        load: :func:`load_archive`, or ``load_legacy`` for a file that is no archive.

    Raises:
        UnsafePickleError: the ``weights_only`` rules do not allow it.
        CorruptCheckpointError: it cannot be loaded, and its bytes are damaged, or tell nothing about that.
        UnloadableError: it cannot be loaded here, although its bytes are those that were written: their checksums fit.
    """
    try:
        with torch_defaults():
            return load(source, allow_pickle, safe_globals, map_location)
    except (Warning, ConfigError):  # a name in safe_globals is wrong
        raise
    except Exception as error:  # a hostile pickle can raise anything
        if isinstance(error, pickle.UnpicklingError) and not allow_pickle:
            raise UnsafePickleError(
                f"{path} holds a pickled object that could run code when loaded "
                f"({reason_of(error, source, safe_globals)}); nothing was changed. If you trust its origin, load it by "
                "load_checkpoint(path, allow_pickle=True), or allow its classes by "
                "load_checkpoint(path, safe_globals=['package.module.Class', ...])"
            ) from error
        if allow_pickle and (isinstance(error, (ImportError, AttributeError)) or _is_as_written(source)):
            raise _unloadable(path, path, error) from error
        raise CorruptCheckpointError(path, f"cannot be read: {error!r}") from error


def _is_as_written(source: IO[bytes] | str) -> bool:
    """Whether the checksum of each record of the archive fits."""
    try:
        with zipfile.ZipFile(source) as archive:
            return archive.testzip() is None
    except Exception:  # noqa: BLE001  # a damaged archive can make zipfile raise anything
        return False
