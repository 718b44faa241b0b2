from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from stager.workers import WorkerPool


@pytest.fixture(scope="package")
def pool() -> Iterator[WorkerPool]:
    """Two workers, for tests that harm nobody: starting one costs seconds."""
    yield from _running(2)


@pytest.fixture(scope="package")
def lone_pool() -> Iterator[WorkerPool]:
    """One worker, for tests that ask it what it holds."""
    yield from _running(1)


def _running(count: int) -> Iterator[WorkerPool]:
    with WorkerPool(count=count) as pool:
        for future in [pool.hand_over(os.getpid) for _ in range(count)]:  # a worker that still starts is not idle
            future.result()
        yield pool
