"""Page-locked host memory, into which a device copies without a detour and without holding up the trainer.

NOTE [ Two ways to page-locked memory ]
- *Registering*: the driver locks pages that somebody else allocated, such as a shared mapping that workers read. CUDA and
  ROCm can; another backend says how with :func:`offer`.
- *torch's pinned allocator*: every backend has it. The memory is the process's own and cannot be shared. Where nothing can
  be registered, copies go through two small buffers of it (``snapshot/device_copies.py``).

If memory cannot be registered, staging goes on: it stays usable, unpinned. One warning says so.
"""

from __future__ import annotations

import warnings
import weakref
from types import SimpleNamespace
from typing import Protocol

import torch

from stager.workers.device import accelerator
from stager.workers.device.cuda import CudaRegistrar

_CHUNK_BYTES = 1 << 30
_state = SimpleNamespace(warned=False)  # for one warning a process; the warnings module counts by call site


class Registrar(Protocol):
    """Registers host memory with a device's driver."""

    def register(self, address: int, nbytes: int) -> str:
        """Register whole pages that no other registration touches. Returns why it cannot, or ``""``."""

    def unregister(self, address: int) -> None:
        """Take back a registration, before the memory is unmapped. Never raises."""


_registrars: dict[str, Registrar] = {"cuda": CudaRegistrar()}


def offer(device_type: str, registrar: Registrar) -> None:
    """Let memory be registered with this type of device from now on; for backends that torch does not bring."""
    _registrars[device_type] = registrar


def can_register() -> bool:
    """Return whether the accelerator of this process can page-lock memory that somebody else allocated."""
    return _registrar() is not None


def pin(owner: torch.UntypedStorage, address: int, nbytes: int) -> bool:
    """Register ``[address, address + nbytes)`` until ``owner`` is collected. On failure, return False, and warn once.

    The range consists of whole pages that no other registration touches, and ``owner`` keeps them mapped.
    """
    registrar = _registrar()
    problem = "the accelerator's backend cannot" if registrar is None else registrar.register(address, nbytes)
    if registrar is None or problem:
        _warn_once(problem, nbytes)
        return False
    # The callback runs before the owner's memory is unmapped. Not at exit: the device's context may be gone by then.
    weakref.finalize(owner, registrar.unregister, address).atexit = False
    return True


def pin_in_chunks(owner: torch.UntypedStorage, address: int, nbytes: int) -> int:
    """As :func:`pin`, a GiB at a time; what is registered before a failure stays pinned. Return the bytes pinned."""
    pinned = 0
    while pinned < nbytes and pin(owner, address + pinned, min(_CHUNK_BYTES, nbytes - pinned)):
        pinned = min(nbytes, pinned + _CHUNK_BYTES)
    return pinned


def new_pinned(nbytes: int) -> torch.Tensor:
    """Return uninitialized bytes from torch's pinned allocator, which keeps freed ones for the next call."""
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


def _registrar() -> Registrar | None:
    device = accelerator.current()
    return None if device is None else _registrars.get(device.type)


def _warn_once(problem: str, nbytes: int) -> None:
    if not _state.warned:
        _state.warned = True
        warnings.warn(
            f"could not pin {nbytes} bytes of host memory ({problem}); staging goes on with unpinned memory, to which "
            "copies are slower. Raise `ulimit -l`, or pin less memory (arena.pin, pin_memory_min_bytes).",
            RuntimeWarning,
            stacklevel=2,
        )
