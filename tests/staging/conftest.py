"""Fixtures of the staging tests."""

from __future__ import annotations

import gc

import pytest
import torch.distributed.checkpoint
import torch.distributed.tensor  # noqa: F401


@pytest.fixture(scope="session", autouse=True)
def cheap_garbage_collection() -> None:
    """The leak check collects garbage around each test; what the imports made need not be looked through every time."""
    gc.collect()
    gc.freeze()
