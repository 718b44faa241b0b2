"""Which rank keeps the replica of which."""

from __future__ import annotations


def partners(rank: int, size: int) -> tuple[int, int]:
    """Of a rank among ``size``: which one keeps its replica, and whose replica it keeps."""
    return (rank + size // 2) % size, (rank - size // 2) % size
