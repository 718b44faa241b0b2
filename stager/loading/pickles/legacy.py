"""Files that ``torch.save`` wrote before torch 1.6, or with ``_use_new_zipfile_serialization=False``: no zip archives.

    five pickles    magic number, version of the protocol, facts about the host, the value, the keys of the storages
    storages        for each key, the number of elements (8 bytes) and the bytes

torch allocates the storages that the value's pickle names before it reads the first of their bytes. So they are compared
with the size of the file first. Even older files, of torch before 0.2, are tar archives. torch itself refuses to read these
under ``weights_only`` rules.

Format: torch.serialization._legacy_save and _legacy_load, torch 2.13.
"""

from __future__ import annotations

import os
import pickle
import pickletools
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import IO, Any

from torch import _weights_only_unpickler, serialization

from stager.loading.pickles.pickle_check import check_pickle, claimed_storages
from stager.workers.checkpoint.formats.safe_globals import allowed
from stager.workers.errors import CorruptCheckpointError

_START = pickle.dumps(serialization.MAGIC_NUMBER, protocol=2)
_PROTOCOL_BYTES = 2
_MAGIC = _START[_PROTOCOL_BYTES:]  # as each protocol of pickle writes it
_MAGIC_AT_MOST = 16  # so many bytes of the pickle come before it

_torch: Any = serialization
_NUM_FACTS = 3  # pickles before that of the value
_COUNT_BYTES = 8
_ADVICE = "; copy it again, or load another checkpoint"


def is_legacy(head: bytes) -> bool:
    """Tell from the first bytes of a file whether it is one of these."""
    if len(head) < len(_START):  # cut short
        return len(head) > _PROTOCOL_BYTES and _START.startswith(head)
    return head[:1] == _START[:1] and _MAGIC in head[: _MAGIC_AT_MOST + len(_MAGIC)]


def check_legacy(file: IO[bytes], nbytes: int, path: str) -> None:
    """Raise unless the file can be one of ``torch.save``, whose values take no more memory than the file has bytes.

    Args:
        file: begins as :func:`is_legacy` says; the data of its tensors is not read.
        nbytes: size of the file.
        path: of the file, for messages.

    Raises:
        CorruptCheckpointError
    """
    try:
        problem = _problem_of(file, nbytes)
    except Exception as error:  # a hostile pickle can make pickletools raise anything
        raise CorruptCheckpointError(path, f"is cut short, or damaged: {error}{_ADVICE}") from error
    if problem is not None:
        raise CorruptCheckpointError(path, f"is cut short, or damaged: {problem}{_ADVICE}")


def _problem_of(file: IO[bytes], nbytes: int) -> str | None:
    file.seek(0)
    for _ in range(_NUM_FACTS):
        check_pickle(_next_pickle(file))
    claimed = claimed_storages(_next_pickle(file), nbytes)
    check_pickle(_next_pickle(file))
    needed, left = sum(claimed.values()) + _COUNT_BYTES * len(claimed), nbytes - file.tell()
    return f"its tensors take {needed} bytes, and the file has {left} left for them" if needed > left else None


def _next_pickle(file: IO[bytes]) -> bytes:
    start = file.tell()
    for _ in pickletools.genops(file):
        pass
    end = file.tell()
    file.seek(start)
    return file.read(end - start)


def load_legacy(
    source: IO[bytes] | str, allow_pickle: bool, safe_globals: Sequence[str] = (), map_location: str = "cpu"
) -> Any:
    """Load a file that was checked, as ``torch.load`` does. To be called under ``torch_defaults()``.

    Raises:
        pickle.UnpicklingError: the ``weights_only`` rules do not allow it, or it is no pickle.
        Exception: anything, from the objects in it.
    """
    rules: AbstractContextManager[None] = nullcontext() if allow_pickle else allowed(safe_globals)
    unpickler = pickle if allow_pickle else _weights_only_unpickler
    file = open(source, "rb") if isinstance(source, str | os.PathLike) else source  # noqa: SIM115  (the next statement closes it)
    with file, warnings.catch_warnings(), rules:
        warnings.filterwarnings("ignore", "TypedStorage is deprecated")
        warnings.filterwarnings("ignore", "Detected pickle protocol")  # the error says so
        return _torch._legacy_load(file, map_location, unpickler, encoding="utf-8")
