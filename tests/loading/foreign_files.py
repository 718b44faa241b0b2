"""Checkpoints in formats of others, and small objects to put into them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner


def save_dcp(path: Path, state: dict[str, Any], *, flat: bool = False) -> Path:
    planner = DefaultSavePlanner(flatten_state_dict=not flat)
    dcp.save(state, checkpoint_id=path, planner=planner, no_dist=True)
    return path


def small_model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.randn(5, 4)).sum().backward()
    optimizer.step()


class Counts:
    """As a data loader: its state has numbers as keys."""

    def __init__(self, counts: dict[int, int]) -> None:
        self.counts = counts

    def state_dict(self) -> dict[str, Any]:
        return {"counts": self.counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counts = state["counts"]
