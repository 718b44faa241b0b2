from __future__ import annotations

from collections.abc import Iterator

import pytest

from stager.workers import WorkerPool


@pytest.fixture(scope="package")
def pool() -> Iterator[WorkerPool]:
    """For tests that harm nobody: starting a worker costs time. It is there before and after each of them."""
    with WorkerPool(count=2) as shared:
        yield shared
