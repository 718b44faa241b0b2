"""The classes that the tests of compatibility are run against."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint._experimental.staging as torch_experimental
import torch.distributed.checkpoint._state_dict_stager as torch_stager
import torch.distributed.checkpoint.staging as torch_staging

import stager.torch_api.staging
import stager.torch_api.staging.state_dict_stager

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
