"""What the memory that an export may take is used for."""

from __future__ import annotations

from dataclasses import dataclass

from stager.workers.errors import UsageError

_CHUNK_BYTES = 256 << 10  # stays in the core's cache from reading to hashing and writing
_FOR_CONVERSION_BYTES = 1 << 20
_FOR_A_THREAD_BYTES = _CHUNK_BYTES + _FOR_CONVERSION_BYTES
SMALLEST_BYTES = _FOR_A_THREAD_BYTES
"""The smallest budget."""


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """The memory for data of an export of weights.

    Attributes:
        num_threads: how many copy at a time.
        chunk_bytes: what each of them reads at a time.
        whole_bytes: what is left for a tensor that has to be in memory as a whole.
    """

    num_threads: int
    chunk_bytes: int
    whole_bytes: int

    @staticmethod
    def of_threads(nbytes: int, num_threads: int) -> MemoryBudget:
        """Divide a budget.

        Args:
            nbytes: the budget.
            num_threads: how many there may be; there are fewer if their memory would take half of the budget.

        Raises:
            UsageError: it is too small.
        """
        if nbytes < SMALLEST_BYTES:
            raise UsageError(f"max_memory_bytes is {nbytes:,} bytes; it must be at least {SMALLEST_BYTES:,}")
        num_threads = max(1, min(num_threads, nbytes // (2 * _FOR_A_THREAD_BYTES)))
        return MemoryBudget(num_threads, _CHUNK_BYTES, nbytes - num_threads * _FOR_A_THREAD_BYTES)
