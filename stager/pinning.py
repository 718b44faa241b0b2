"""Pinning a slab: registering its memory with CUDA, so that copies from the device run at full speed and asynchronously.

Not run on a GPU yet: written against the CUDA runtime's documentation (cudaHostRegister, cudaHostUnregister).
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from workers.slab import Slab

logger = logging.getLogger("stager")

_CHUNK_BYTES = 1 << 30  # one refusal in a large slab still leaves the rest pinned; shorter driver locks
_REGISTER_PORTABLE = 1

_warned = False


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


class Pinning:
    """The registration of one slab. Registered on creation, chunk by chunk; released by :meth:`release`.

    A refusal (the memlock limit, too little memory) leaves the rest of the slab unpinned: copies still work, slower. It
    is said once.
    """

    def __init__(self, slab: Slab) -> None:
        self._slab = slab  # keeps the memory mapped as long as it is registered
        self._chunks: list[int] = []
        if torch.cuda.is_available():
            self._register()

    @property
    def nbytes(self) -> int:
        """How much of the slab is pinned."""
        return min(self._slab.nbytes, len(self._chunks) * _CHUNK_BYTES)

    def _register(self) -> None:
        runtime = _runtime()
        for start in range(0, self._slab.nbytes, _CHUNK_BYTES):
            address = self._slab.address + start
            nbytes = min(_CHUNK_BYTES, self._slab.nbytes - start)
            code = int(runtime.cudaHostRegister(address, nbytes, _REGISTER_PORTABLE))
            if code != 0:
                _clear_cuda_error()
                _warn_once(self._slab.nbytes, code)
                return
            self._chunks.append(address)

    def release(self) -> None:
        while self._chunks:
            code = int(_runtime().cudaHostUnregister(self._chunks.pop()))
            if code != 0:
                _clear_cuda_error()
                logger.warning("cudaHostUnregister failed with CUDA error %d", code)


def _clear_cuda_error() -> None:
    """A failed call leaves its error behind, and the next unrelated CUDA call would raise it."""
    get_last_error = getattr(_runtime(), "cudaGetLastError", None)
    if get_last_error is not None:
        get_last_error()


def _warn_once(nbytes: int, code: int) -> None:
    global _warned  # noqa: PLW0603  (once per process, whichever arena meets it)
    if not _warned:
        _warned = True
        logger.warning(
            "cannot pin %d bytes of host memory (CUDA error %d): snapshots use unpinned memory, which is slower; "
            "raise `ulimit -l`, lower arena.buffers, or set arena.pin to false",
            nbytes,
            code,
        )
