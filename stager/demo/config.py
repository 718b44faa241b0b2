"""The demo's settings: stager's own sections and one for the training run; those of the demo on ranks are in
``ranks/config.py``."""

from __future__ import annotations

from abc import abstractmethod

from pydantic import Field, model_validator
from typing_extensions import Self

from stager.config import Section, StagerConfig
from stager.config.host import usable_cores
from stager.config.models import Count

BYTES_PER_PARAMETER = 12  # float32 weight and AdamW's two float32 moments


class TrainingSettings(Section):
    """What is trained, and how often it is saved: the same for one process and for several ranks."""

    steps: int = Field(default=100, ge=4, description="Optimizer steps of the training run; a multiple of save_every.")
    save_every: int = Field(default=10, ge=1, description="Optimizer steps from one save to the next.")
    batch_size: int = Field(default=2, ge=1, description="Sequences per step.")
    block_size: int = Field(default=64, ge=2, description="Bytes of text per sequence.")
    n_layer: int = Field(default=4, ge=1, description="Transformer blocks.")
    n_head: int = Field(default=8, ge=1, description="Attention heads; divides n_embd.")
    n_embd: int = Field(default=512, ge=1, description="Width of the model, in floats.")
    dropout: float = Field(default=0.1, ge=0.0, lt=1.0, description="Probability that dropout zeroes an activation.")
    lr: float = Field(default=1e-3, gt=0.0, description="Highest learning rate, reached after the warm-up.")
    warmup_steps: int = Field(default=10, ge=0, description="Steps over which the learning rate rises to lr.")
    weight_decay: float = Field(default=0.1, ge=0.0, description="AdamW's weight decay, as a share of lr per step.")
    seed: int = Field(default=1234, ge=0, description="Seed of weights, dropout and data order.")

    @model_validator(mode="after")
    def _trainable(self) -> Self:
        if self.steps % self.save_every:
            raise ValueError(
                f"steps ({self.steps}) must be a multiple of save_every ({self.save_every}): "
                "the last checkpoint is compared with the final weights"
            )
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) must be below steps ({self.steps})")
        return self

    @property
    def num_saves(self) -> int:
        """Saves in an uninterrupted training run."""
        return self.steps // self.save_every

    @property
    @abstractmethod
    def threads(self) -> int:
        """Threads that torch computes with in each training process."""

    @property
    @abstractmethod
    def num_copies(self) -> int:
        """States that are on disk at once, at most: checkpoints, and final states for the comparison."""

    @property
    def checkpoint_nbytes(self) -> int:
        """Bytes of weights and AdamW moments in one checkpoint: all but a few kilobytes of it."""
        per_block = 12 * self.n_embd**2 + 13 * self.n_embd
        return BYTES_PER_PARAMETER * (self.n_layer * per_block + (256 + self.block_size + 2) * self.n_embd)


class DemoSettings(TrainingSettings):
    """What is trained, when it is saved and killed, and how the lost time is measured.

    The defaults, which ``configs/demo.yaml`` repeats, make a model of 13 million parameters and checkpoints of 153 MB.
    """

    num_threads: Count = Field(
        default="auto", description="Threads that torch computes with; auto: all usable cores but one, 1 to 4."
    )
    kill_staging_at_save: int = Field(
        default=4, ge=2, description="First kill: while the snapshot of this save (counted from 1) is taken."
    )
    kill_writing_at_save: int = Field(
        default=7, ge=2, description="Second kill: when this save is staged and not yet committed."
    )
    measure_saves: int = Field(default=8, ge=1, description="Measured saves of each of the three ways to save.")
    measure_steps: int = Field(default=4, ge=1, description="Steps in each measured stretch of training, at least.")

    @model_validator(mode="after")
    def _kills_in_order(self) -> Self:
        if not self.kill_staging_at_save < self.kill_writing_at_save < self.num_saves:
            raise ValueError(
                f"kill_staging_at_save ({self.kill_staging_at_save}) must be below kill_writing_at_save "
                f"({self.kill_writing_at_save}), and that below the number of saves ({self.num_saves})"
            )
        return self

    @property
    def threads(self) -> int:
        """``num_threads`` as a number.  One core is left to the workers, as a trainer that computes on a GPU leaves it:
        threads that meet at a barrier many times per step all wait for the one that lost its core."""
        return max(1, min(4, usable_cores() - 1)) if self.num_threads == "auto" else self.num_threads

    @property
    def num_copies(self) -> int:
        return self.num_saves + 2 + 2  # checkpoints, final states, and a measured save beside its successor


class TrainingConfig(StagerConfig):
    """stager's configuration with the section of a demo."""

    @property
    @abstractmethod
    def training(self) -> TrainingSettings:
        """The demo's section."""


class DemoConfig(TrainingConfig):
    """stager's configuration with the demo's section."""

    demo: DemoSettings = Field(default_factory=DemoSettings, description="The demo's training run.")

    @property
    def training(self) -> DemoSettings:
        return self.demo

    def with_fixed_threads(self) -> Self:
        """With ``num_threads`` as a number: bits depend on it, so every child must get the same."""
        fixed = self.demo.model_copy(update={"num_threads": self.demo.threads})
        return self.model_copy(update={"demo": fixed})
