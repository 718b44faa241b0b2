"""The names that code blocks of the documents use without making them: a small training loop's.

``ckpt`` is a Checkpointer that is opened for a block that uses it and does not make it.
"""

from __future__ import annotations

import os
import re
import warnings
from types import CodeType
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

import stager
from stager import Checkpointer, PerRank

TRAIN_PY = """
import torch


def build():
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 10))
    return model


def build_state():
    model = build()
    return {"model": model, "optimizer": torch.optim.AdamW(model.parameters())}
"""
"""The reader's module, which commands name as ``train:build``."""

BESIDE_WEIGHTS = {"config.json": "{}", "tokenizer.json": "{}", "names.json": '{"weight": "layer.weight"}'}
"""What commands that export weights name."""


class Loader:
    """A data loader that knows its position."""

    def __init__(self) -> None:
        self.position = 0

    def __iter__(self) -> Any:
        for _ in range(3):
            self.position += 1
            yield torch.randn(4, 8)

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def prepare_process() -> None:
    """Make this process, in the current directory, one in which every block can run."""
    # torch's own, where dcp.save runs without a process group.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    for name, text in {"train.py": TRAIN_PY, **BESIDE_WEIGHTS}.items():
        with open(name, "w", encoding="utf-8") as file:
            file.write(text)
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")


class Namespace:
    """What the blocks of one document share."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        model = nn.Linear(8, 8)
        optimizer = torch.optim.AdamW(model.parameters())

        def train(*_: object) -> torch.Tensor:
            loss = model(torch.randn(4, 8)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        self._names: dict[str, Any] = {
            "__name__": "__main__",
            "torch": torch,
            "nn": nn,
            "dist": dist,
            "dcp": dcp,
            "stager": stager,
            "Checkpointer": Checkpointer,
            "PerRank": PerRank,
            "model": model,
            "opt": optimizer,
            "optimizer": optimizer,
            "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1),
            "loader": Loader(),
            "state": {"model": model, "optimizer": optimizer},
            "train": train,
            "config": None,
            "path": "runs/by-path/step-00000100",
            "start": 0,
            "step": 7,
            "steps": 3,
        }

    def run(self, code: CodeType, text: str) -> None:
        """Run a block."""
        names = self._names
        if re.search(r"\bckpt\b", text) and not re.search(r"\bckpt = |\bas ckpt\b", text):
            with Checkpointer("runs/block") as names["ckpt"]:
                exec(code, names)
        else:
            exec(code, names)
