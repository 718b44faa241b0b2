"""Page-locking of host memory, so that the GPU copies into it without a detour.

If the memory cannot be registered, staging goes on: the memory stays usable, unpinned and slower. One warning says so. The
error is taken out of the CUDA runtime, which keeps it for the next caller: the next kernel launch would raise it.

Written against the CUDA runtime's documentation; not yet run on a GPU.
"""

# mypy: allow-untyped-calls
# (torch annotates neither its storages nor its rebuilding functions)

from __future__ import annotations

import ctypes
import os
import warnings
import weakref
from types import SimpleNamespace

import torch

_CHUNK_BYTES = 1 << 30
_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every context of the process
_state = SimpleNamespace(warned=False)  # for one warning a process; the warnings module counts by call site


def pin(owner: torch.UntypedStorage, address: int, nbytes: int) -> bool:
    """Register ``[address, address + nbytes)`` until ``owner`` is collected. On failure, return False, and warn once.

    The range consists of whole pages that no other registration touches, and ``owner`` keeps them mapped.
    """
    code = int(torch.cuda.cudart().cudaHostRegister(address, nbytes, _PORTABLE))
    if code != 0:
        _clear_error()
        _warn_once(code, nbytes)
        return False
    # The callback runs before the owner's memory is unmapped. Not at exit: the CUDA context may be gone by then.
    weakref.finalize(owner, _unpin, address).atexit = False
    return True


def pin_in_chunks(owner: torch.UntypedStorage, address: int, nbytes: int) -> int:
    """As :func:`pin`, a GiB at a time; what is registered before a failure stays pinned. Return the bytes pinned."""
    pinned = 0
    while pinned < nbytes and pin(owner, address + pinned, min(_CHUNK_BYTES, nbytes - pinned)):
        pinned = min(nbytes, pinned + _CHUNK_BYTES)
    return pinned


def _unpin(address: int) -> None:
    code = int(torch.cuda.cudart().cudaHostUnregister(address))
    if code != 0:
        _clear_error()


def _warn_once(code: int, nbytes: int) -> None:
    if not _state.warned:
        _state.warned = True
        warnings.warn(
            f"could not pin {nbytes} bytes of host memory (CUDA error {code}); staging goes on with unpinned memory, "
            "to which copies are slower. Raise `ulimit -l`, or pin less memory (pin_memory_min_bytes).",
            RuntimeWarning,
            stacklevel=2,
        )


def _clear_error() -> None:
    """Take the failed call's error out of the CUDA runtime's per-thread slot."""
    major = (torch.version.cuda or "").split(".", maxsplit=1)[0]
    try:
        runtime = ctypes.CDLL(f"libcudart.so.{major}", mode=os.RTLD_NOLOAD | os.RTLD_NOW)
        runtime.cudaGetLastError()
    except (OSError, AttributeError):
        _clear_error_by_launch()


def _clear_error_by_launch() -> None:
    """Clear the CUDA error that a failed call left, where ``cudaGetLastError`` cannot be called.

    torch checks for errors after it launches a kernel, and thereby clears them. So launch one, and ignore what it raises.
    """
    try:
        torch.zeros(1, device="cuda")
    except RuntimeError:
        return
