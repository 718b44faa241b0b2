"""A demo on ranks, small enough for the suite."""

from __future__ import annotations

from typing import Any

import pytest

from stager.demo.ranks import RanksConfig

TINY: dict[str, Any] = {
    "steps": 24,
    "save_every": 2,
    "batch_size": 2,
    "block_size": 16,
    "n_layer": 1,
    "n_head": 2,
    "n_embd": 64,
    "dropout_steps": 16,
    "warmup_steps": 2,
    "kill_job_at_save": 2,
    "kill_rank_at_save": 4,
    "other_ranks": [1],
}


@pytest.fixture(scope="session")
def tiny_ranks() -> RanksConfig:
    """A model of 70 thousand parameters, trained for 24 steps on two ranks, then on one."""
    return RanksConfig.model_validate({"demo_ranks": TINY})
