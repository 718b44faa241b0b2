"""Ranks whose states have parameters, tensors with attributes and of a class, and one tensor object in two places."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from stager import Checkpointer, PerRank


class Marked(torch.Tensor):
    mark: str


def leaves_of(rank: int) -> dict[str, Any]:
    """A state of which each rank writes a part: what is large is cut between rows."""
    torch.manual_seed(0)
    large: Any = nn.Parameter(torch.randn(1024, 1024))
    large.sequence_parallel = True
    marked = torch.randn(1000, 700).as_subclass(Marked)
    marked.mark = "m"
    tied = nn.Parameter(torch.randn(800, 800), requires_grad=False)
    return {
        "large": large,
        "small": [nn.Parameter(torch.randn(3)) for _ in range(6)],
        "marked": marked,
        "tied": {"a": tied, "b": tied, "c": tied.data},
        "own": PerRank({"p": nn.Parameter(torch.full((2,), float(rank)))}),
        "plain": torch.randn(5),
    }


def save(rank: int, directory: str) -> None:
    config = {"workers": {"count": 1}, "ranks": {"timeout_secs": 60}}
    with Checkpointer(Path(directory, "run"), config) as ckpt:
        state = leaves_of(rank)
        ckpt.save(1, state).upload_completion.result(60)
        state["large"].requires_grad_(rank == 0)  # the first rank decides, and no rank waits for another
        state["small"][0].requires_grad_(False)
        ckpt.save(2, state).upload_completion.result(60)
