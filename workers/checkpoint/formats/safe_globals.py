"""Which classes ``weights_only`` rules let a checkpoint name, beside those that torch allows itself.

Plain data that programs hold: numpy's scalars, arrays and random states, dates, paths, decimals, UUIDs, Python's own
collections. Each has a constructor that does nothing but make the value. What a hostile checkpoint could make these
allocate is bounded before they are called (``stager.loading.pickles.pickle_check``).

The user adds classes by ``loading.safe_globals`` or ``torch.serialization.add_safe_globals``.
"""

from __future__ import annotations

import argparse
import builtins
import collections
import datetime
import decimal
import importlib
import io
import pathlib
import re
import types
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from threading import RLock
from typing import IO, Any, cast

import torch

from stager.workers.checkpoint.formats.torch_settings import torch_defaults
from stager.workers.errors import ConfigError

_PLAIN: tuple[Any, ...] = (
    *(getattr(builtins, name) for name in ("list", "dict", "tuple", "int", "float", "str", "bool", "complex")),
    *(set, frozenset, range, slice, bytes, bytearray),
    *(collections.deque, collections.defaultdict, collections.Counter, collections.OrderedDict),
    *(datetime.date, datetime.time, datetime.datetime, datetime.timedelta, datetime.timezone),
    *(decimal.Decimal, uuid.UUID, uuid.SafeUUID, types.SimpleNamespace, argparse.Namespace),
    *(collections.UserDict, collections.UserList),
    *(pathlib.Path, pathlib.PosixPath, pathlib.PurePath, pathlib.PurePosixPath, pathlib.PureWindowsPath),
)
_NUMPY = (
    *("numpy.ndarray", "numpy.dtype", "numpy.asarray"),  # the last: of a tensor only, see pickle_check
    *("numpy._core.multiarray._reconstruct", "numpy._core.multiarray.scalar"),
    *("numpy.core.multiarray._reconstruct", "numpy.core.multiarray.scalar"),  # what numpy 1 writes
    *(f"numpy.random._pickle.__{name}_ctor" for name in ("randomstate", "generator", "bit_generator")),
    *("numpy.random._mt19937.MT19937", "numpy.random._pcg64.PCG64", "numpy.random._pcg64.PCG64DXSM"),
    *("numpy.random.mtrand.RandomState", "numpy.random._generator.Generator", "torch._C.Generator"),
    *("numpy.random._philox.Philox", "numpy.random._sfc64.SFC64"),
    *("numpy.random.bit_generator.SeedSequence", "numpy.random.bit_generator.__pyx_unpickle_SeedSequence"),
)
_NAMED = re.compile(r"Unsupported global: GLOBAL (\S+)")  # torch names the class of a file that is no archive only so
_NEWER = "Unsupported operand 149"  # FRAME
_lock = RLock()  # torch keeps one list for the whole process


@lru_cache(maxsize=1)
def plain_data() -> tuple[tuple[Any, str], ...]:
    """Return the classes and functions that are allowed by default, each with the name that pickles give it."""
    import numpy.random  # late: few checkpoints need it

    allowed = [(value, f"{value.__module__}.{value.__qualname__}") for value in _PLAIN]
    # Python 3.13 calls the module of these classes pathlib._local; pickles of other versions call it pathlib.
    allowed += [(value, f"pathlib.{value.__qualname__}") for value in _PLAIN if issubclass(value, pathlib.PurePath)]
    for name in _NUMPY:
        with _warnings_off():
            try:
                allowed.append((resolve(name), name))
            except ConfigError:  # this numpy calls it otherwise
                continue
    dtypes = [value for value in vars(numpy.dtypes).values() if isinstance(value, type)]
    allowed += [(value, f"{value.__module__}.{value.__qualname__}") for value in dtypes]
    return tuple(allowed)


@contextmanager
def _warnings_off() -> Iterator[None]:
    import warnings

    with warnings.catch_warnings():  # numpy 2 warns of the names that numpy 1 had
        warnings.simplefilter("ignore")
        yield


def resolve(name: str) -> Any:
    """Import a class or function by its name, ``package.module.Class``.

    Raises:
        ConfigError: there is none of that name here.
    """
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"loading.safe_globals: {name!r} cannot be imported ({error}); give the full name, package.module.Class"
        ) from error


@contextmanager
def allowed(names: Iterable[str] = ()) -> Iterator[None]:
    """Let torch's ``weights_only`` rules accept plain data, and the classes of these names, inside the block.

    Raises:
        ConfigError: a name cannot be imported.
    """
    chosen: list[Any] = [*plain_data(), *((resolve(name), name) for name in names)]
    with _lock, torch.serialization.safe_globals(chosen):
        yield


def refused_classes(blob: bytes, names: Sequence[str] = ()) -> list[str]:
    """List the classes and functions of an object's archive that are not allowed, by their names."""
    with allowed(names):
        try:
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(blob)))
        except Exception:  # noqa: BLE001  # an archive that torch cannot read: the caller has its reason
            return []


def refusal_of(blob: bytes, names: Sequence[str] = ()) -> str | None:
    """Say why ``weights_only`` rules refuse an object's archive, naming the classes; None if they accept it."""
    try:
        with allowed(names), torch_defaults():
            torch.load(io.BytesIO(blob), weights_only=True, map_location="cpu", mmap=False)
    except Exception as error:  # noqa: BLE001  # torch raises several types; each means that it is refused
        return reason_of(error, io.BytesIO(blob), names)
    return None


def reason_of(error: Exception, archive: IO[bytes] | str, names: Sequence[str] = ()) -> str:
    """Say in one line why torch refused an archive: the classes that are not allowed, else torch's reason."""
    with allowed(names):
        try:
            unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(cast(Any, archive))
        except Exception:  # noqa: BLE001  # the archive may be hostile
            unsafe = []
    unsafe = unsafe or _NAMED.findall(str(error))
    if unsafe:
        many = len(unsafe) > 1
        return f"its class{'es' * many} {', '.join(sorted(unsafe))} {'are' if many else 'is'} not allowed"
    if _NEWER in str(error):
        return "it was written by a pickle protocol newer than 2, which these rules do not read"
    lines = [line.strip() for line in str(error).splitlines() if "WeightsUnpickler error:" in line]
    return lines[0].rpartition("WeightsUnpickler error:")[2].strip() if lines else str(error).partition("\n")[0]
