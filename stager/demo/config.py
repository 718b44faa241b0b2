"""The settings of the demo: stager's own sections and the section ``demo``, for one rank or several."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from stager.config import Section, StagerConfig
from stager.config.host import usable_cores
from stager.config.models import Count
from stager.demo.leg import Aim

BYTES_PER_PARAMETER = 12  # float32 weight and AdamW's two float32 moments

ON_RANKS: dict[str, Any] = {
    "steps": 40,
    "save_every": 4,
    "batch_size": 4,
    "n_embd": 256,
    "dropout_steps": 24,
    "warmup_steps": 5,
    "num_threads": 1,
    "kill_writing_at_save": 2,
    "kill_staging_at_save": 4,
    "other_ranks": [1, 4],
    "measure_saves": 0,
}
"""What a demo on several ranks has instead of the defaults: ranks share the cores of one host."""


class DemoSettings(Section):
    """What is trained, when it is saved and killed, on how many ranks it is resumed, and how lost time is measured.

    The defaults, which ``configs/demo.yaml`` repeats, make a model of 13 million parameters and checkpoints of 153 MB.
    """

    steps: int = Field(default=100, ge=4, description="Optimizer steps of the training run; a multiple of save_every.")
    save_every: int = Field(default=10, ge=1, description="Optimizer steps from one save to the next.")
    batch_size: int = Field(
        default=2, ge=1, description="Sequences per step over all ranks; a multiple of every number of ranks."
    )
    block_size: int = Field(default=64, ge=2, description="Bytes of text per sequence.")
    n_layer: int = Field(default=4, ge=1, description="Transformer blocks.")
    n_head: int = Field(default=8, ge=1, description="Attention heads; divides n_embd.")
    n_embd: int = Field(default=512, ge=1, description="Width of the model, in floats.")
    dropout: float = Field(default=0.1, ge=0.0, lt=1.0, description="Probability that dropout zeroes an activation.")
    dropout_steps: Literal["all"] | Annotated[int, Field(ge=1)] = Field(
        default="all",
        description="First steps, which have dropout; each rank draws its own. Later steps depend on the number of "
        "ranks by rounding only.",
    )
    lr: float = Field(default=1e-3, gt=0.0, description="Highest learning rate, reached after the warm-up.")
    warmup_steps: int = Field(default=10, ge=0, description="Steps over which the learning rate rises to lr.")
    weight_decay: float = Field(default=0.1, ge=0.0, description="AdamW's weight decay, as a share of lr per step.")
    seed: int = Field(default=1234, ge=0, description="Seed of weights, dropout and data order.")
    num_threads: Count = Field(
        default="auto", description="Threads of torch on each rank; auto: 1 to 4, all ranks leave one usable core free."
    )
    kill_staging_at_save: int = Field(
        default=4, ge=2, description="The last rank is killed while this save (from 1) takes its snapshot."
    )
    kill_writing_at_save: int = Field(
        default=7, ge=2, description="All ranks are killed when this save (from 1) is staged and not yet committed."
    )
    other_ranks: list[int] = Field(
        default=[], description="Numbers of ranks on which the checkpoint of step dropout_steps is resumed as well."
    )
    tolerance: float = Field(
        default=1e-4, gt=0.0, description="Largest difference of losses on other numbers of ranks, in nats per byte."
    )
    measure_saves: int = Field(
        default=8, ge=0, description="Measured saves of each of three ways to save, on one rank; 0: do not measure."
    )
    measure_steps: int = Field(default=4, ge=1, description="Steps in each measured stretch of training, at least.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.steps % self.save_every:
            raise ValueError(
                f"steps ({self.steps}) must be a multiple of save_every ({self.save_every}): "
                "the last checkpoint is compared with the final weights"
            )
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) must be below steps ({self.steps})")
        (_, first), (_, second) = self.kills
        if not first < second < self.num_saves:
            raise ValueError(
                f"kill_staging_at_save ({self.kill_staging_at_save}) and kill_writing_at_save "
                f"({self.kill_writing_at_save}) must differ and be below the number of saves ({self.num_saves})"
            )
        if self.other_ranks and (self.last_dropout_step % self.save_every or self.last_dropout_step >= self.steps):
            raise ValueError(
                f"dropout_steps ({self.dropout_steps}) must be a multiple of save_every ({self.save_every}) and below "
                f"steps ({self.steps}): other_ranks resume from the checkpoint of that step"
            )
        for num_ranks in self.other_ranks:
            self.check_ranks(num_ranks)
        return self

    def check_ranks(self, num_ranks: int) -> None:
        """Check that the batch can be divided among ``num_ranks`` ranks.

        Raises:
            ValueError: it cannot.
        """
        if num_ranks < 1 or self.batch_size % num_ranks:
            raise ValueError(f"batch_size ({self.batch_size}) must be a multiple of the number of ranks ({num_ranks})")

    @property
    def num_saves(self) -> int:
        """Saves in an uninterrupted training run."""
        return self.steps // self.save_every

    @property
    def kills(self) -> list[tuple[Aim, int]]:
        """What each kill aims at, and the save (from 1) during which it comes, in the order of the saves."""
        aims = [(Aim.STAGING, self.kill_staging_at_save), (Aim.WRITING, self.kill_writing_at_save)]
        return sorted(aims, key=lambda kill: kill[1])

    @property
    def last_dropout_step(self) -> int:
        """``dropout_steps`` as a number."""
        return self.steps if self.dropout_steps == "all" else self.dropout_steps

    def threads_for(self, num_ranks: int) -> int:
        """``num_threads`` as a number, for each of ``num_ranks`` ranks.

        One core is left to the workers, as a trainer that computes on a GPU leaves it. Threads that meet at a barrier
        many times per step would all wait for the thread that lost its core.
        """
        return max(1, min(4, (usable_cores() - 1) // num_ranks)) if self.num_threads == "auto" else self.num_threads

    @property
    def max_copies(self) -> int:
        """The most states that are on disk at once: checkpoints, and final states for the comparison."""
        measured = 2 if self.measure_saves else 0  # a measured save beside its successor
        resumed_elsewhere = 1 + (self.steps - self.last_dropout_step) // self.save_every + 1
        return self.num_saves + 2 + measured + len(self.other_ranks) * resumed_elsewhere

    @property
    def checkpoint_nbytes(self) -> int:
        """Bytes of weights and AdamW moments in one checkpoint: all but a few kilobytes of it."""
        per_block = 12 * self.n_embd**2 + 13 * self.n_embd
        return BYTES_PER_PARAMETER * (self.n_layer * per_block + (256 + self.block_size + 2) * self.n_embd)


class DemoConfig(StagerConfig):
    """stager's configuration with the demo's section."""

    demo: DemoSettings = Field(default_factory=DemoSettings, description="The demo's training run.")

    def with_fixed_threads(self, num_ranks: int) -> Self:
        """Return this configuration with ``num_threads`` as a number: results depend on it, bit for bit, so every
        process of the demo must use the same number."""
        fixed = self.demo.model_copy(update={"num_threads": self.demo.threads_for(num_ranks)})
        return self.model_copy(update={"demo": fixed})


class RanksSettings(DemoSettings):
    """The same settings with the defaults of a demo on several ranks, which ``configs/torchrun.yaml`` repeats.

    They make a model of 3.2 million parameters and checkpoints of 39 MB.
    """

    @model_validator(mode="before")
    @classmethod
    def _on_ranks(cls, values: Any) -> Any:
        return {**ON_RANKS, **values} if isinstance(values, Mapping) else values


class RanksConfig(DemoConfig):
    """:class:`DemoConfig` with the defaults of a demo on several ranks."""

    demo: RanksSettings = Field(default_factory=RanksSettings, description="The demo's training run.")
