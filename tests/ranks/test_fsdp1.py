"""FSDP1: saved by shards, loaded on the same and on another number of ranks, and never one rank's moments for all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.ranks.fsdp1 import different
from tests.staging.ranks import run_ranks

_FSDP1 = "tests.ranks.fsdp1"


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_sharded_state_dicts_are_loaded_on_two_ranks_and_on_one_and_by_stock(tmp_path: Path) -> None:
    assert run_ranks(f"{_FSDP1}:save_and_load", 2, tmp_path) == [[], []]
    for leftover in [tmp_path / "store", *tmp_path.glob("result-*")]:
        leftover.unlink(missing_ok=True)
    assert run_ranks(f"{_FSDP1}:load", 1, tmp_path) == [[]]
    expected = torch.load(tmp_path / "expected.pt")
    stock = _emptied(expected)
    dcp.load(stock, checkpoint_id=str(tmp_path / "run" / "step-00000001"), no_dist=True)
    assert different(expected, stock) == []


def _emptied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _emptied(child) for key, child in value.items()}
    return torch.zeros_like(value) if isinstance(value, torch.Tensor) else value


def test_moments_of_flat_parameters_that_differ_between_ranks_fail_the_save(tmp_path: Path) -> None:
    for text in run_ranks(f"{_FSDP1}:save_plain_optimizer", 2, tmp_path):
        assert text.startswith("InconsistentRanksError: ")
        assert "optimizer.state.0.exp_avg (ranks 0, 1)" in text
        assert "FSDP.optim_state_dict" in text
