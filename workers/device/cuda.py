"""What only CUDA, and ROCm under the same names, can do: page-lock memory that somebody else allocated.

Written against the documentation of the CUDA runtime; not yet run on a GPU.
"""

# mypy: allow-untyped-calls
# (torch annotates neither its runtime module nor what it returns)

from __future__ import annotations

import ctypes
import os

import torch

_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every context of the process


class CudaRegistrar:
    """Registers host memory with the CUDA runtime: see :class:`stager.workers.device.host_memory.Registrar`."""

    def register(self, address: int, nbytes: int) -> str:
        """Register whole pages. Returns why it cannot, or ``""``."""
        code = int(torch.cuda.cudart().cudaHostRegister(address, nbytes, _PORTABLE))
        if code == 0:
            return ""
        clear_error()
        return f"CUDA error {code}"

    def unregister(self, address: int) -> None:
        """Take back :meth:`register`."""
        if int(torch.cuda.cudart().cudaHostUnregister(address)) != 0:
            clear_error()


def clear_error() -> None:
    """Take the failed call's error out of the CUDA runtime's per-thread slot: the next kernel launch would raise it."""
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


def is_capturing() -> bool:
    """Return whether the current stream records a graph."""
    return bool(torch.cuda.is_current_stream_capturing())


def device_names() -> tuple[str, ...]:
    """Return the names of the devices, without creating a context on any.

    Raises:
        RuntimeError, AssertionError: torch or the driver says why there are none.
    """
    return tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
