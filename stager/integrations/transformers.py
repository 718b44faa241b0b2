"""stager in the Trainer of Hugging Face, and in those of TRL, which are derived from it.

    from stager.integrations.transformers import stager_trainer

    trainer = stager_trainer(Trainer)(model, arguments, train_dataset=data)
    trainer.train(resume_from_checkpoint=True)

The Trainer decides when to save, as always. What it does then is replaced:

Trainer._maybe_log_save_evaluate
`-- _save_checkpoint          one snapshot of weights, optimizer, scheduler, scaler and random numbers; returns when it is
    |                         taken, or before that for tensors that only optimizer.step() changes
    |-- workers               write OUT/.checkpoint-100.partial-ID, and rename it to OUT/checkpoint-100
    `-- rotation thread       waits for that, and applies save_total_limit (trainer_rotation.py)
Trainer._finalize_training    waits for all of that first: the best checkpoint is loaded there

``checkpoint-100`` has the entries ``model`` (of peft: ``adapters``), ``optimizer``, ``scheduler``, ``scaler`` and ``rng``,
and the files of ``trainer_files.py``. Checkpoints of other writers are loaded by the Trainer's own methods.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from accelerate.optimizer import AcceleratedOptimizer
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import SaveStrategy

from stager import Event, PerRank, RngState, load_checkpoint
from stager.config import load_config
from stager.integrations.transformers_parts.peft_adapters import ADAPTERS, adapters_of, is_peft_model, load_adapters
from stager.integrations.transformers_parts.trainer_files import TrainerFiles, uncompiled
from stager.integrations.transformers_parts.trainer_leftovers import Leftovers, take_leftovers
from stager.integrations.transformers_parts.trainer_refusals import refuse_what_cannot_be_saved
from stager.integrations.transformers_parts.trainer_rotation import RotationRule
from stager.integrations.transformers_parts.trainer_saves import Config, TrainerSaves
from stager.integrations.two_weights import has_two_weights
from stager.workers.checkpoint.directory.manifest_file import has_own_manifest, read_manifest
from stager.workers.checkpoint.storage.paths import local_path
from stager.workers.errors import UsageError

logger = logging.getLogger("stager")


class StagerTrainerMixin(Trainer):
    """A Trainer whose checkpoints stager writes, while training goes on.

    Derive from it and a Trainer::

        class MyTrainer(StagerTrainerMixin, Trainer): ...

    A Trainer with a ``_save_checkpoint()`` of its own, as TRL's have, comes first, so that its method is called and then
    calls this one. :func:`stager_trainer` makes such a class::

        class MyTrainer(SFTTrainer, StagerTrainerMixin): ...

    ``train()`` returns when the last checkpoint is committed. It raises what :class:`stager.PathCheckpointer` raises, and
    UsageError for arguments of the Trainer that stager cannot follow.

    Attributes:
        stager_config: configuration of stager: path of a YAML file, a mapping, a ``StagerConfig``; None: the defaults.
        stager_on_event: called with each event of each save, in a thread of its own, ``CommittedEvent`` among them; None:
            nobody is. It may be a method.
    """

    stager_config: ClassVar[Config] = None
    stager_on_event: ClassVar[Callable[..., object] | None] = None

    _stager_saves: TrainerSaves | None = None  # while it trains
    _stager_files: TrainerFiles

    # -- training -----------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, as ``Trainer.train()`` does. A checkpoint that a killed run's workers still commit is waited for."""
        refuse_what_cannot_be_saved(self)
        if "://" in self.args.output_dir:
            local_path(self.args.output_dir, "output_dir")  # raises: the Trainer's own files are in it, too
        with self._stager_open() as saves:
            if resume_from_checkpoint:
                self._stager_recover(saves, resume_from_checkpoint)
            guarding = _Guarding(self)
            self.add_callback(guarding)
            try:
                return super().train(resume_from_checkpoint, *args, **kwargs)
            finally:
                self.remove_callback(guarding)

    def _stager_recover(self, saves: TrainerSaves, resume_from_checkpoint: str | bool) -> None:
        if isinstance(resume_from_checkpoint, bool):
            saves.recover(self.args.output_dir)
            return
        directory = os.path.dirname(os.path.abspath(resume_from_checkpoint))
        # Another run's directory is only read.
        if os.path.realpath(directory) == os.path.realpath(self.args.output_dir):
            saves.recover(directory)

    @contextmanager
    def _stager_open(self) -> Iterator[TrainerSaves]:
        """Give what saves; open it for this call only, if ``train()`` has not opened it."""
        if self._stager_saves is not None:
            yield self._stager_saves
            return
        self._stager_saves = TrainerSaves(self.stager_config, self.stager_on_event)
        self._stager_files = TrainerFiles(self)
        try:
            yield self._stager_saves
        except BaseException as error:
            saves, self._stager_saves = self._stager_saves, None
            if saves is not None:
                saves.finish_after(error)
            raise
        self._stager_finish()

    def _stager_finish(self) -> None:
        """Wait until everything is committed that was begun. Raises the errors that nobody has looked at."""
        saves, self._stager_saves = self._stager_saves, None
        if saves is None:
            return
        saves.finish()
        best = self.state.best_model_checkpoint
        if best is not None and not os.path.isdir(best):  # the save of it failed, and that was not to be an error
            logger.warning("the best checkpoint, %s, was not committed; there is none to load", best)
            self.state.best_model_checkpoint = None

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self._stager_finish()
        return super()._finalize_training(*args, **kwargs)

    def _sorted_checkpoints(self, *args: Any, **kwargs: Any) -> Any:  # transformers 5.0 has no _finalize_training()
        self._stager_finish()
        return super()._sorted_checkpoints(*args, **kwargs)

    # -- saving -------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with self._stager_open() as saves:
            if self.hp_search_backend is None and trial is None:
                self.store_flos()
            run_directory = self._get_output_dir(trial=trial)
            path = os.path.abspath(_checkpoint_path(run_directory, self.state.global_step))
            self._stager_note_best(saves, run_directory)
            leftovers, files, rule = Leftovers(), {}, None
            if self.args.should_save:  # rank 0
                leftovers = take_leftovers(path)
                files = {**leftovers.files, **self._stager_files.make()}
                rule = self._stager_rule()
            handle = saves.save(path, self._stager_state(), self.state.global_step, files, rule)
            if leftovers.is_preemption:  # the process may be killed, with its workers, once this has returned
                handle.upload_completion.result()

    def _stager_note_best(self, saves: TrainerSaves, run_directory: str) -> None:
        """Set ``best_model_checkpoint`` before it is serialised: the best one may be this one, or still be in flight."""
        best_step = self.state.best_global_step
        if self.args.save_strategy == SaveStrategy.NO or not best_step:
            return
        best = _checkpoint_path(run_directory, best_step)
        if best_step == self.state.global_step or saves.will_have(os.path.abspath(best)):
            self.state.best_model_checkpoint = best

    def _stager_rule(self) -> RotationRule | None:
        limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
        if limit is None or limit <= 0:
            return None
        return RotationRule(limit, None if best is None else os.path.abspath(best))

    def _stager_state(self) -> dict[str, Any]:
        state: dict[str, Any] = _weights_of(uncompiled(self.model))
        if self.args.save_only_model:
            return state
        state["optimizer"] = _inner(self.optimizer)
        state["scheduler"] = self.lr_scheduler
        if (scaler := getattr(self.accelerator, "scaler", None)) is not None:
            state["scaler"] = scaler
        state["rng"] = PerRank(RngState())
        return state

    # -- loading ------------------------------------------------------------------------------------------------

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not has_own_manifest(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        self._stager_load_weights(resume_from_checkpoint, self.model if model is None else model)

    def _load_best_model(self) -> None:
        self._stager_finish()
        best = self.state.best_model_checkpoint
        if best is None:
            return
        if not has_own_manifest(best):
            super()._load_best_model()
            return
        logger.info("loading the best model from %s (%s)", best, self.state.best_metric)
        self._stager_load_weights(best, self.model)

    def _stager_load_weights(self, path: str, model: Any) -> None:
        model = uncompiled(model)
        if is_peft_model(model):
            load_adapters(path, model)
        else:
            self._stager_load(path, _weights_of(model))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not has_own_manifest(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
        elif "optimizer" in _entries(checkpoint):
            self._stager_load(checkpoint, {"optimizer": _inner(self.optimizer), "scheduler": self.lr_scheduler})
        else:
            logger.warning(
                "%s has only the model (save_only_model): the optimizer, the scheduler and the random numbers begin anew",
                checkpoint,
            )

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not has_own_manifest(checkpoint):
            super()._load_scaler(checkpoint)
        elif (scaler := getattr(self.accelerator, "scaler", None)) is not None and "scaler" in _entries(checkpoint):
            self._stager_load(checkpoint, {"scaler": scaler})

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None or not has_own_manifest(checkpoint):
            super()._load_rng_state(checkpoint)
        elif "rng" in _entries(checkpoint):
            self._stager_load(checkpoint, {"rng": PerRank(RngState())})

    def _stager_load(self, path: str, into: dict[str, Any]) -> None:
        """Fill objects of this rank. Every rank reads for itself: all read the same, and one that cannot ends the job."""
        safe_globals = load_config(self.stager_config).loading.safe_globals
        load_checkpoint(path, into, safe_globals=safe_globals)


def stager_trainer(
    trainer: type[Any], *, config: Config = None, on_event: Callable[[Event], object] | None = None
) -> type[Any]:
    """Make a class of Trainers whose checkpoints stager writes.

    Args:
        trainer: ``transformers.Trainer``, or a class that is derived from it: of TRL, or of your own.
        config: of stager: path of a YAML file, a mapping, a ``StagerConfig``; None: the defaults.
        on_event: called with each event of each save, in a thread of its own; None: nobody is.

    Returns:
        A class derived from ``trainer`` and :class:`StagerTrainerMixin`.

    Raises:
        UsageError: ``trainer`` is not such a class.
    """
    if not (isinstance(trainer, type) and issubclass(trainer, Trainer)):
        raise UsageError(f"stager_trainer() takes a class derived from transformers.Trainer, got {trainer!r}")
    bases = (StagerTrainerMixin,) if trainer is Trainer else (trainer, StagerTrainerMixin)
    members = {
        "__doc__": f"{trainer.__name__} whose checkpoints stager writes, while training goes on.",
        "__module__": trainer.__module__,
        "stager_config": config,
        "stager_on_event": None if on_event is None else staticmethod(on_event),
    }
    return type(f"Stager{trainer.__name__}", bases, members)


class _Guarding(TrainerCallback):
    """Guards the optimizer as soon as there is one, so that memory for the first snapshot is prepared while steps go on."""

    def __init__(self, trainer: StagerTrainerMixin) -> None:
        self._trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        saves, optimizer = self._trainer._stager_saves, _inner(self._trainer.optimizer)
        if saves is not None and not self._trainer.args.save_only_model and not has_two_weights(optimizer):
            saves.guard(optimizer)


def _inner(optimizer: Any) -> Any:
    """Return the torch optimizer that Accelerate's wrapper works with."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


def _weights_of(model: Any) -> dict[str, Any]:
    """Return what is saved of a model, and filled by loading: the module, or the weights of its adapters."""
    return {ADAPTERS: adapters_of(model)} if is_peft_model(model) else {"model": model}


def _entries(path: str) -> set[Any]:
    """Return the entries at the top of a checkpoint's state."""
    return {at[0] for at, _ in read_manifest(path).paths()}


def _checkpoint_path(run_directory: str, step: int) -> str:
    return os.path.join(run_directory, f"checkpoint-{step}")
