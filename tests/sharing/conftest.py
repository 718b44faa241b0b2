from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from stager.sharing.movable import torch_reserves
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With torch before 2.10 nothing is moved, and what is seen here of moved storages cannot be."""
    if torch_reserves():
        return
    for item in items:
        if item.path.parent == Path(__file__).parent and item.path.name != "test_reserving.py":
            item.add_marker(pytest.mark.skip(reason="this torch reserves no shared memory, so nothing is moved"))
