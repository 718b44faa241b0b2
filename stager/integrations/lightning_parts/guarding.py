"""The callback that lets snapshots be taken while training goes on."""

from __future__ import annotations

from typing import Any

from stager import UsageError
from stager.integrations.lightning_parts.writer import CheckpointWriter, optimizers_of


class GuardMixin:
    """Guards the trainer's optimizers, so that ``save`` returns before their tensors are copied.

    The copy goes on while the next batch runs forward and backward, and ends before the optimizer writes. In return, nothing
    else may write to parameters between a save and the next step. Lightning's own callbacks that do so (averaged weights)
    do it when an epoch, a validation or the training begins or ends; there this callback waits for the copy, and goes before
    them wherever it stands in the list of callbacks.
    """

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Become the first callback: one before it would write to the weights before this one has waited.

        Raises:
            UsageError: the trainer's strategy would not ask stager to load a checkpoint.
        """
        refuse_other_strategies(trainer)
        trainer.callbacks.remove(self)
        trainer.callbacks.insert(0, self)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Guard the optimizers.

        Raises:
            UsageError: the trainer does not save with stager, or has no optimizer.
            ArgumentError: there is no torch optimizer in one of them.
        """
        if trainer.fast_dev_run:
            return  # Lightning saves nothing then
        writer = writer_of(trainer)
        if writer is None:
            raise UsageError(
                "StagerGuard is for a Trainer that saves with stager: add plugins=[StagerCheckpointIO()], or "
                "strategy=StagerModelParallelStrategy(); or leave StagerGuard out"
            )
        # Lightning makes up an optimizer where configure_optimizers() returns None.
        if all(type(optimizer).__name__ == "_MockOptimizer" for optimizer in trainer.optimizers):
            raise UsageError("the trainer has no optimizer that could be guarded; leave StagerGuard out")
        if saves_here(trainer, writer):
            writer.guard(optimizers_of(trainer.optimizers))

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Wait until every snapshot is taken."""
        _wait(trainer)

    on_validation_start = on_train_epoch_start
    on_train_end = on_train_epoch_start


def _wait(trainer: Any) -> None:
    if (writer := writer_of(trainer)) is not None:
        writer.wait_for_staging()


def writer_of(trainer: Any) -> CheckpointWriter | None:
    """Return what a trainer saves with; None if that is not stager."""
    strategy = trainer.strategy
    writer = getattr(strategy, "stager_writer", None)
    inner = strategy.checkpoint_io if writer is None else None
    while inner is not None and writer is None:  # a CheckpointIO may wrap another one
        writer = getattr(inner, "stager_writer", None)
        inner = getattr(inner, "checkpoint_io", None)
    return writer if isinstance(writer, CheckpointWriter) else None


def refuse_other_strategies(trainer: Any) -> None:
    """Raise a UsageError if a CheckpointIO of stager's saves, but the trainer's strategy loads without asking it.

    Strategies of sharded models do so (FSDP, ModelParallelStrategy, DeepSpeed). Some let a CheckpointIO save all the same:
    the trainer could not resume from that.
    """
    strategy = trainer.strategy
    if hasattr(strategy, "stager_writer") or writer_of(trainer) is None:
        return
    by = next(one for one in type(strategy).__mro__ if "load_checkpoint" in vars(one))
    if by.__name__ != "Strategy":
        raise UsageError(
            f"{type(strategy).__name__} loads checkpoints without asking StagerCheckpointIO, so that the trainer could not "
            "resume; use StagerModelParallelStrategy, or that strategy without stager's plugin and callbacks"
        )


def saves_here(trainer: Any, writer: CheckpointWriter) -> bool:
    """Tell whether this rank saves: each does if they save together, otherwise only rank 0."""
    return bool(trainer.is_global_zero) or writer.config.ranks.together is not False
