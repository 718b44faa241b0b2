"""A small training run with everything that a real one has to save. It makes the same bits in every process."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from stager.state.rng_state import RngState
from stager.stress.digest import digest
from stager.stress.states import LeafSpec, Zoo

_BATCH = 4
_FEATURES = 8
_EMA_DECAY = 0.9


@dataclass(frozen=True)
class TrainingSpec:
    """What is trained.

    Attributes:
        seed: of weights, data, and the other values.
        width, depth: of the model's hidden layers.
        tied: its first and last weights are one tensor.
        optimizer: AdamW, or SGD with momentum.
        leaves: what else the state holds.
    """

    seed: int
    width: int
    depth: int
    tied: bool
    optimizer: Literal["adamw", "sgd"]
    leaves: tuple[LeafSpec, ...] = ()

    @property
    def max_nbytes(self) -> int:
        """Upper bound of the size of the largest state, in bytes."""
        parameters = self.depth * (self.width * self.width + 5 * self.width) + 2 * self.width * _FEATURES + 64
        return parameters * 16 + 40_000 + sum(leaf.max_nbytes + 512 for leaf in self.leaves)


class _Model(nn.Module):
    def __init__(self, spec: TrainingSpec) -> None:
        super().__init__()
        self.first = nn.Linear(_FEATURES, spec.width)
        layers: list[nn.Module] = []
        for _ in range(spec.depth):
            layers += [nn.Linear(spec.width, spec.width), nn.BatchNorm1d(spec.width), nn.GELU()]
        self.middle = nn.Sequential(*layers)
        self.last = nn.Linear(_FEATURES, spec.width)
        if spec.tied:
            self.last.weight = self.first.weight

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.middle(self.first(batch))
        return hidden @ self.last.weight


class Training:
    """The run after ``step``, with that step's structure; its values are those of the start until a checkpoint is loaded.

    Args:
        step: -1: the start, before the first step.
    """

    def __init__(self, spec: TrainingSpec, step: int = -1) -> None:
        torch.manual_seed(spec.seed)
        random.seed(spec.seed)
        np.random.seed(spec.seed)
        self.step = step
        self.model = _Model(spec)
        if spec.optimizer == "adamw":
            self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        else:
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-2, momentum=0.9)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 5, gamma=0.9)
        self.ema = {name: value.detach().clone() for name, value in self.model.named_parameters()}
        self.zoo = Zoo(spec.seed, spec.leaves, max(0, step))
        self.progress: dict[str, Any] = {"step": step, "losses": []}

    @property
    def state(self) -> dict[str, Any]:
        """The state that a checkpoint must hold."""
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "ema": self.ema,
            "zoo": self.zoo.values,
            "progress": self.progress,
            "rng": RngState(),
        }

    def advance(self) -> None:
        """Train one step."""
        self.step += 1
        batch = torch.randn(_BATCH, _FEATURES) * random.uniform(0.5, 1.5)
        loss = (self.model(batch) - batch).square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        with torch.no_grad():
            for name, value in self.model.named_parameters():
                self.ema[name].mul_(_EMA_DECAY).add_(value, alpha=1 - _EMA_DECAY)
        if self.step > 0:  # the start has the values of step 0
            self.zoo.advance(self.step)
        self.progress["step"] = self.step
        self.progress["losses"] = [*self.progress["losses"][-4:], loss.item()]


def digests_of(spec: TrainingSpec, num_steps: int) -> Iterator[str]:
    """Yield the hash of the true state after each step: that of a run without faults."""
    training = Training(spec)
    for _ in range(num_steps):
        training.advance()
        yield digest(training.state)
