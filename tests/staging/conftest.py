"""The classes that the tests of compatibility are run against, and the ways to make a copy."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint._experimental.staging as torch_experimental
import torch.distributed.checkpoint._state_dict_stager as torch_stager
import torch.distributed.checkpoint.staging as torch_staging

import stager.torch_api.staging
import stager.torch_api.staging.state_dict_stager
from stager import WorkerStager
from stager.torch_api.staging.state_dict_stager import StateDictStager

Stage = Callable[..., Any]
"""Makes a copy. The options of a ``StateDictStager`` may be given; workers have none: their copies are shared and leased."""

TORCH = SimpleNamespace(
    is_torch=True,
    StateDictStager=torch_stager.StateDictStager,
    AsyncStager=torch_staging.AsyncStager,
    StagingOptions=torch_staging.StagingOptions,
    DefaultStager=torch_staging.DefaultStager,
    BlockingAsyncStager=torch_staging.BlockingAsyncStager,
    ReplicationStager=torch_staging._ReplicationStager,
    CheckpointStager=torch_experimental.CheckpointStager,
    CheckpointStagerConfig=torch_experimental.CheckpointStagerConfig,
    ExperimentalStager=torch_experimental.DefaultStager,
)
STAGER = SimpleNamespace(
    is_torch=False,
    StateDictStager=stager.torch_api.staging.state_dict_stager.StateDictStager,
    AsyncStager=stager.torch_api.staging.AsyncStager,
    StagingOptions=stager.torch_api.staging.StagingOptions,
    DefaultStager=stager.torch_api.staging.DefaultStager,
    BlockingAsyncStager=stager.torch_api.staging.BlockingAsyncStager,
    ReplicationStager=stager.torch_api.staging._ReplicationStager,
    CheckpointStager=stager.torch_api.staging.CheckpointStager,
    CheckpointStagerConfig=stager.torch_api.staging.CheckpointStagerConfig,
    ExperimentalStager=stager.torch_api.staging.DefaultStager,
)


@pytest.fixture
def no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without one, whatever this one has."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(params=[TORCH, STAGER], ids=["torch", "stager"])
def api(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(scope="package")
def package_stager() -> Iterator[WorkerStager]:
    """One for all tests that harm no worker: starting one costs seconds."""
    with WorkerStager({"workers": {"count": 2, "nice": 0}, "staging": {"copy_threads": 1}}) as stager:
        stager.stage({}).result()  # its thread is started, too
        yield stager


@pytest.fixture
def worker_stager(package_stager: WorkerStager) -> Iterator[WorkerStager]:
    """The same, of which a test leaves no memory."""
    yield package_stager
    package_stager.synchronize_staging()
    gc.collect()
    package_stager._memory._pool.drop_unleased()


@pytest.fixture(params=["trainer", "workers"])
def stage(request: pytest.FixtureRequest, worker_stager: WorkerStager) -> Stage:
    """Copies by the engine in this process, and by workers."""
    if request.param == "trainer":
        return lambda source, **options: StateDictStager(**options).stage(source)
    return lambda source, **_: worker_stager.stage(source).result()


@pytest.fixture(params=["torch", "stager", "workers"])
def copying_api(request: pytest.FixtureRequest, worker_stager: WorkerStager) -> Any:
    """``StateDictStager`` of torch and of stager, and a ``WorkerStager`` with its ``stage()``."""
    if request.param != "workers":
        return {"torch": TORCH, "stager": STAGER}[request.param]

    def stage_by_workers(source: Any) -> Any:
        return worker_stager.stage(source).result()

    by_workers = SimpleNamespace(stage=stage_by_workers)
    return SimpleNamespace(is_torch=False, StateDictStager=lambda **_: by_workers)
