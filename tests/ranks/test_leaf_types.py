"""What two ranks save has the types that it had, whoever wrote which part of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from stager import load_checkpoint
from tests.ranks.leaf_bodies import Marked, leaves_of
from tests.staging.ranks import run_ranks


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_parameters_classes_and_objects_of_two_ranks(tmp_path: Path) -> None:
    run_ranks("tests.ranks.leaf_bodies:save", 2, tmp_path)
    saved = leaves_of(0)
    for step in (1, 2):
        path = str(tmp_path / "run" / f"step-{step:08d}")
        loaded = load_checkpoint(path, allow_pickle=True).state
        large, marked, tied = loaded["large"], loaded["marked"], loaded["tied"]
        assert type(large) is nn.Parameter and large.requires_grad and vars(large) == {"sequence_parallel": True}
        assert torch.equal(large, saved["large"])
        assert type(marked) is Marked and marked.mark == "m"
        assert torch.equal(marked.as_subclass(torch.Tensor), saved["marked"].as_subclass(torch.Tensor))
        assert tied["a"] is tied["b"] and type(tied["a"]) is nn.Parameter and type(tied["c"]) is torch.Tensor
        assert not tied["a"].requires_grad and tied["a"].data_ptr() == tied["c"].data_ptr()
        assert [p.requires_grad for p in loaded["small"]] == [step == 1] + [True] * 5
        assert all(map(torch.equal, loaded["small"], saved["small"]))
        for rank in range(2):
            own = loaded["own"][f"rank-{rank}"]["p"]
            assert type(own) is nn.Parameter and own.tolist() == [float(rank)] * 2
        assert type(loaded["plain"]) is torch.Tensor and not loaded["plain"].requires_grad
        target = {"large": torch.zeros(1024, 1024), "tied": {"b": torch.zeros(800, 800)}}
        dcp.load(target, checkpoint_id=path, no_dist=True)
        assert torch.equal(target["large"], saved["large"]) and torch.equal(target["tied"]["b"], tied["a"])
