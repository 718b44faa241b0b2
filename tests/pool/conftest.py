from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from stager.workers import WorkerPool
from stager.workers.pool import process
from tests import prepared_workers


@pytest.fixture(scope="package", autouse=True)
def every_worker_is_fresh() -> Iterator[None]:
    """How a worker starts is what these tests are about: no prepared ones."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(process, "subprocess", subprocess)
        monkeypatch.setenv(prepared_workers.FRESH, "1")
        yield


@pytest.fixture(scope="package")
def pool(every_worker_is_fresh: None) -> Iterator[WorkerPool]:
    """For tests that harm nobody: starting a worker costs time. It outlives each test: the leak check sees it throughout."""
    with WorkerPool(count=2) as shared:
        yield shared
