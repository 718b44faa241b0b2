"""The settings of the demo on several ranks: stager's own sections and one of its own."""

from __future__ import annotations

from pydantic import Field, model_validator
from typing_extensions import Self

from stager.demo.config import TrainingConfig, TrainingSettings


class RanksSettings(TrainingSettings):
    """What is trained, when the job and one of its ranks are killed, and on how many ranks it is resumed.

    ``configs/torchrun.yaml`` repeats the defaults.
    """

    steps: int = Field(default=40, ge=4, description="Optimizer steps of the training run; a multiple of save_every.")
    save_every: int = Field(default=4, ge=1, description="Optimizer steps from one save to the next.")
    batch_size: int = Field(
        default=4, ge=1, description="Sequences per step, over all ranks; a multiple of every number of ranks."
    )
    n_embd: int = Field(default=256, ge=1, description="Width of the model, in floats.")
    warmup_steps: int = Field(default=5, ge=0, description="Steps over which the learning rate rises to lr.")
    dropout_steps: int = Field(
        default=24, ge=0, description="Steps with dropout; afterwards only rounding depends on the number of ranks."
    )
    num_threads: int = Field(default=1, ge=1, description="Threads that torch computes with on each rank.")
    kill_job_at_save: int = Field(
        default=2,
        ge=2,
        description="The job is killed when this save (from 1) is staged on all ranks, not yet committed.",
    )
    kill_rank_at_save: int = Field(
        default=4, ge=2, description="The last rank is killed while its part of this save's snapshot is taken."
    )
    other_ranks: list[int] = Field(
        default=[1, 4], description="Numbers of ranks that the run is resumed on, from the checkpoint of dropout_steps."
    )
    tolerance: float = Field(
        default=1e-4, gt=0.0, description="By how much losses on other numbers of ranks may differ, in nats per byte."
    )

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if not self.kill_job_at_save < self.kill_rank_at_save < self.num_saves:
            raise ValueError(
                f"kill_job_at_save ({self.kill_job_at_save}) must be below kill_rank_at_save "
                f"({self.kill_rank_at_save}), and that below the number of saves ({self.num_saves})"
            )
        if self.dropout_steps % self.save_every or not 0 < self.dropout_steps < self.steps:
            raise ValueError(
                f"dropout_steps ({self.dropout_steps}) must be a multiple of save_every ({self.save_every}) and below "
                f"steps ({self.steps}): its checkpoint is resumed on other numbers of ranks"
            )
        for number in self.other_ranks:
            self.check_ranks(number)
        return self

    def check_ranks(self, num_ranks: int) -> None:
        """
        Raises:
            ValueError: a batch cannot be dealt out to so many ranks.
        """
        if num_ranks < 1 or self.batch_size % num_ranks:
            raise ValueError(f"batch_size ({self.batch_size}) must be a multiple of the number of ranks ({num_ranks})")

    @property
    def threads(self) -> int:
        return self.num_threads

    @property
    def num_copies(self) -> int:
        final = self.num_saves - self.dropout_steps // self.save_every + 1
        return self.num_saves + 1 + 2 + len(self.other_ranks) * (final + 2)


class RanksConfig(TrainingConfig):
    """stager's configuration with the section of the demo on ranks."""

    demo_ranks: RanksSettings = Field(default_factory=RanksSettings, description="The training run on ranks.")

    @property
    def training(self) -> RanksSettings:
        return self.demo_ranks
