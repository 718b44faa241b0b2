"""torchtitan: a checkpoint manager whose checkpoints stager writes, while training goes on.

    from stager.integrations.torchtitan import StagerCheckpointManager

    trainer_config.checkpoint = StagerCheckpointManager.Config(interval=500, folder="checkpoint")

torchtitan's Trainer calls it as it calls its own ``CheckpointManager``, on every rank:

Trainer.train
|-- load()                     the newest checkpoint of the folder, or initial_load_path
|-- train_step()
|   `-- maybe_wait_for_staging()   before optimizers.step(): until what the step writes to is copied
`-- save(step)                 every step; the manager decides. Returns when the snapshot is taken, or before that for
    |                          tensors that only optimizers.step() changes
    `-- workers                write folder/.step-~100.partial-ID, and rename it to folder/step-100
Trainer.close
`-- close()                    waits for commits; of the last step's export, too

A checkpoint has the keys of torchtitan's own and stock ``.metadata``, so either manager resumes what the other has written.
``torchtitan_parts`` says what this file is made of.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
import tyro
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torchtitan.components.checkpointer import (
    DATALOADER,
    LR_SCHEDULER,
    MODEL,
    OPTIMIZER,
    BaseCheckpointManager,
    ModelWrapper,
)
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.tools import filesystem

from stager.checkpointer import Checkpointer
from stager.config import StagerConfig, load_config
from stager.integrations.torchtitan_parts.contents import (
    RNG,
    Choice,
    Contents,
    candidates_in,
    chosen_in,
    contents_of,
    instead_of,
    passed_over,
)
from stager.integrations.torchtitan_parts.export_directory import ExportDirectory
from stager.integrations.torchtitan_parts.hf_export import HFExport
from stager.integrations.torchtitan_parts.hf_weights import is_sharded, load_hf
from stager.integrations.torchtitan_parts.others import remove_surplus_of_others
from stager.integrations.torchtitan_parts.ranks import (
    damage_on_any_rank,
    num_ranks,
    of_rank_0,
    own_rank,
    without_advice,
)
from stager.integrations.torchtitan_parts.targets import TrainingState, in_stored_dtypes, to_targets
from stager.loading.foreign import load_checkpoint
from stager.saving.save import SaveHandle
from stager.state.per_rank import PerRank
from stager.state.rng_state import RngState
from stager.telemetry.event import CommittedEvent, Event
from stager.workers.checkpoint.directory.run_directory import SkippedCheckpoint
from stager.workers.errors import ConfigError, CorruptCheckpointError

logger = logging.getLogger("stager")

_NAME = "step-{step}"


class StagerCheckpointManager(BaseCheckpointManager):
    """torchtitan's checkpoint manager, with stager's workers to write.

    Choose it in the configuration of the Trainer: ``checkpoint=StagerCheckpointManager.Config(interval=500)``. The settings
    are those of torchtitan, with the same meaning. torchtitan makes the manager.

    Args:
        config, dataloader, model_parts, optimizers, lr_schedulers, states, sd_adapter, base_folder: as of torchtitan's
            ``CheckpointManager``.

    Attributes:
        checkpointer: the :class:`stager.Checkpointer` of the folder, for ``listen()``, ``on_preemption()``, ``protect()``.
        states: what is saved, by the entries' names; ``model`` stands for the entries of the model.
        save_future: the ``upload_completion`` of the last save; None: there is none to wait for.

    Raises:
        ConfigError: settings of torchtitan and of stager contradict each other, or cannot be followed; says which.
        Exception: as of :class:`stager.Checkpointer`.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseCheckpointManager.Config):
        """torchtitan's settings of checkpoints, and these of stager."""

        enable: bool = True
        """Whether to save and load at all. torchtitan's own is off by default."""

        stager_config: str | None = None
        """Path of a YAML file with stager's configuration; None: there is none."""

        stager_settings: Annotated[dict[str, Any], tyro.conf.Suppress] = field(default_factory=dict)
        """stager's configuration as a mapping of sections, in place of the file. It is no flag of the command line."""

        guard: bool = True
        """Copy parameters and optimizer state while training goes on; only the optimizers may then write to them."""

        save_rng: bool = True
        """Save the random numbers of each rank, too, and load them where as many ranks go on."""

        def __post_init__(self) -> None:
            BaseCheckpointManager.Config.__post_init__(self)
            if self.stager_config is not None and self.stager_settings:
                raise ValueError(
                    "stager_config names a file, and stager_settings has settings; take one of the two out"
                )

    checkpointer: Checkpointer
    save_future: Future[Any] | None

    def __init__(
        self,
        config: Config,
        *,
        dataloader: Any,
        model_parts: list[torch.nn.Module],
        optimizers: Any,
        lr_schedulers: Any,
        states: dict[str, Any],
        sd_adapter: Any,
        base_folder: str = "",
    ) -> None:
        self.enable = config.enable
        if not self.enable:
            return
        self._config = config
        self.folder = _folder(base_folder, config.folder)
        self.interval, self.keep_latest_k = config.interval, config.keep_latest_k
        self.sd_adapter = sd_adapter
        if config.last_save_in_hf and sd_adapter is None:
            raise ConfigError(
                "checkpoint.last_save_in_hf is True, and this model has no sd_adapter, which translates its names; set "
                "last_save_in_hf=False"
            )
        self.states: dict[str, Any] = {
            **states,
            MODEL: ModelWrapper(model_parts),
            OPTIMIZER: optimizers,
            DATALOADER: dataloader,
            LR_SCHEDULER: lr_schedulers,
        }
        self.save_future = None
        self._handles: list[SaveHandle] = []
        self._export: HFExport | None = None
        self._given = _checked(load_config(config.stager_config or config.stager_settings), config)
        removes_others = own_rank() == 0 and config.keep_latest_k > 0
        self.checkpointer = Checkpointer(
            self.folder,
            _run_config(self._given, config),
            read_only=config.load_only,
            on_event=_removing_others(self.folder, config.keep_latest_k) if removes_others else None,
        )
        self._exports = ExportDirectory(self.folder, self._given.retention.protect)
        if config.load_only:
            return
        try:
            if own_rank() == 0:
                self._exports.put_back()
            if config.guard:
                self.checkpointer.guard(*optimizers)
        except BaseException:
            self.checkpointer.close()
            raise

    # -- saving -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _save(self, curr_step: int, last_step: bool = False) -> bool:
        if not self._should_save(curr_step, last_step):
            return False
        if last_step and self._config.last_save_model_only:
            self._save_weights(curr_step)
        else:
            self._began(self.checkpointer.save(curr_step, self._training_state()))
        return True

    def _should_save(self, curr_step: int, last_step: bool) -> bool:
        if self._config.load_only:
            return False
        is_first = curr_step == 1 and self._config.enable_first_step_checkpoint
        return is_first or last_step or curr_step % self.interval == 0

    def _training_state(self) -> dict[str, Any]:
        state = {name: value for name, value in self.states.items() if name != MODEL}
        state |= self.states[MODEL].state_dict()
        state[OPTIMIZER] = self.states[OPTIMIZER].state_dict()  # as a plain dict: torchtitan's keys, not torch's
        if self._config.save_rng:
            state[RNG] = PerRank(RngState())
        return state

    def _save_weights(self, step: int) -> None:
        """Save what a training has made: the model, in ``export_dtype``."""
        dtype = TORCH_DTYPE_MAP[self._config.export_dtype]
        weights = {
            name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for name, value in self.states[MODEL].state_dict().items()
        }
        if not self._config.last_save_in_hf:
            self._began(self.checkpointer.save(step, weights))
            return
        self._export = HFExport(self._given, self._exports, step, writes_files=own_rank() == 0)
        self._began(self._export.save(self.sd_adapter.to_hf(weights)))

    def _began(self, handle: SaveHandle) -> None:
        self._handles = [one for one in self._handles if not one.upload_completion.done()]
        self._handles.append(handle)
        self.save_future = handle.upload_completion

    # -- waiting, and the end -----------------------------------------------------------------------------------

    def _maybe_wait_for_staging(self) -> None:
        if not self._config.load_only:
            self.checkpointer.wait_for_staging()

    def _wait_for_saving(self) -> None:
        handles, self._handles, self.save_future = self._handles, [], None
        for handle in handles:
            handle.upload_completion.result()

    def _close(self) -> None:
        export, self._export = self._export, None
        try:
            if export is not None:
                wait([one.upload_completion for one in self._handles])  # else one of this step could take the name back
                export.finish(self.checkpointer._forget_replicas)
        finally:
            self.checkpointer.close()

    # -- loading ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _load(self, step: int = -1) -> bool:
        # The Checkpointer has waited for what the workers of a killed run still had to commit.
        if step == -1:
            return self._load_newest() or self._load_initial()
        choice = of_rank_0(lambda: chosen_in(self.folder, step))
        try:
            self._load_choice(choice)
        except CorruptCheckpointError as error:
            found = without_advice(error)
            raise CorruptCheckpointError(found.path, f"{found.problem}; {instead_of(self.folder, [step])}") from error
        return True

    def _load_newest(self) -> bool:
        """Load the newest checkpoint that is whole; each is loaded by what it has in it. Returns False if there is none.

        Raises:
            CorruptCheckpointError: all that are there are damaged; or a damaged one may have overwritten what the next one
                does not have.
        """
        candidates, damaged, was_tried = candidates_in(self.folder), list[SkippedCheckpoint](), False
        while (found := of_rank_0(functools.partial(next, candidates, None))) is not None:
            if isinstance(found, Choice):
                if found.step == 0 and was_tried:
                    break  # a seed checkpoint has no optimizer
                problem = damage_on_any_rank(functools.partial(self._load_choice, found))
                if problem is None:
                    self.checkpointer._fell_back(damaged, found.step)
                    return True
                was_tried |= found.contents.is_ours  # all of another's is read before anything is overwritten
                found = passed_over(found.contents.path, problem)
            logger.warning("%s is passed over: %s", os.path.join(self.folder, found.name), found.reason)
            damaged.append(found)
            if found.step is not None and self.checkpointer._restores_from_replicas(found.step):
                candidates, damaged = candidates_in(self.folder), []
        if damaged:
            steps = [one.step for one in damaged if one.step is not None]
            advice = of_rank_0(lambda: instead_of(self.folder, steps))
            raise CorruptCheckpointError(os.path.join(self.folder, damaged[0].name), f"{damaged[0].reason}; {advice}")
        return False

    def _load_choice(self, choice: Choice) -> None:
        logger.info("loading %s", choice.contents.path)
        load = self._loader_at(choice.contents.path)
        if choice.contents.is_ours:
            load = functools.partial(self.checkpointer.load, choice.step)
        if choice.step == 0:  # a seed checkpoint
            self._load_model(choice.contents, load)
        else:
            self._load_training(choice.contents, load)

    def _loader_at(self, path: str) -> Callable[..., Any]:
        rules = self._given.loading
        permitted: dict[str, Any] = {"allow_pickle": rules.allow_pickle, "safe_globals": rules.safe_globals}
        return lambda into, **options: load_checkpoint(path, into, **permitted, **options)

    def _load_initial(self) -> bool:
        path = self._config.initial_load_path
        if self._config.initial_load_in_hf:
            self._load_hf(self._hf_path(path))
            return True
        if path is None:
            logger.info(
                "%s has no checkpoint to go on from, and there is no initial_load_path: a fresh start", self.folder
            )
            return False
        contents = of_rank_0(lambda: contents_of(_local(path, "initial_load_path")))
        if self._config.initial_load_model_only:
            self._load_model(contents, self._loader_at(contents.path))
        else:
            self._load_training(contents, self._loader_at(contents.path))
        logger.info("loaded %s", contents.path)
        return True

    def _load_training(self, contents: Contents, load: Callable[..., Any]) -> None:
        excluded = set(self._config.exclude_from_loading)
        if unknown := sorted(excluded - self.states.keys() - {RNG}):
            raise ConfigError(
                f"checkpoint.exclude_from_loading has {', '.join(unknown)}; there are {', '.join((*self.states, RNG))}"
            )
        with_rng = RNG not in excluded and contents.num_ranks == num_ranks()
        if contents.num_ranks and not with_rng:
            logger.info(
                "the random numbers of %s are not loaded; %d ranks have saved them", contents.path, contents.num_ranks
            )
        state = TrainingState(self.states, excluded, with_rng=with_rng)
        load(state.into, rename=to_targets)
        state.finish()

    def _load_model(self, contents: Contents, load: Callable[..., Any]) -> None:
        model = self.states[MODEL]
        into = in_stored_dtypes(model.state_dict(), contents.dtypes)
        load(into)
        model.load_state_dict(into)

    def _hf_path(self, path: str | None) -> str:
        if self.sd_adapter is None:
            raise ConfigError(
                "checkpoint.initial_load_in_hf is True, and this model has no sd_adapter, which translates its names"
            )
        found = path or self.sd_adapter.hf_assets_path
        if not found:
            raise ConfigError(
                "checkpoint.initial_load_in_hf is True; set initial_load_path or hf_assets_path to a directory of weights"
            )
        return _local(found, "initial_load_path" if path else "hf_assets_path")

    def _load_hf(self, path: str) -> None:
        model = self.states[MODEL]
        into = self.sd_adapter.to_hf(model.state_dict())
        is_quantized = self._config.initial_load_in_hf_quantized
        if is_quantized or of_rank_0(lambda: is_sharded(path)):  # the adapter knows how to undo that
            dcp_load(into, storage_reader=self.sd_adapter.get_hf_storage_reader(path, is_quantized))
        else:
            into = load_hf(path, into)
        model.load_state_dict(self.sd_adapter.from_hf(into))
        logger.info("loaded the weights of %s", path)


# -- settings ---------------------------------------------------------------------------------------------------------


def _folder(base_folder: str, folder: str) -> str:
    found = str(filesystem.join(base_folder, folder))
    return os.path.abspath(_local(found, "folder"))


def _local(path: str, setting: str) -> str:
    if filesystem.is_remote(path):
        raise ConfigError(
            f"checkpoint.{setting} is {path!r}, and stager reads and writes file systems that are mounted; name a directory "
            "that all ranks see"
        )
    return path


def _checked(given: StagerConfig, config: Any) -> StagerConfig:
    """Return stager's configuration if torchtitan's settings allow it."""
    if given.persistence.format != "dcp":
        raise ConfigError(
            f"persistence.format is {given.persistence.format}, and torchtitan's own manager reads dcp only; take it out"
        )
    if given.persistence.name not in (_NAME, type(given.persistence)().name):
        raise ConfigError(
            f"persistence.name is {given.persistence.name!r}, and checkpoints have torchtitan's names, {_NAME}; take it out"
        )
    if given.retention.has_rules and config.keep_latest_k > 0:
        raise ConfigError(
            f"checkpoint.keep_latest_k is {config.keep_latest_k}, and retention has rules; both say what is kept: set "
            "keep_latest_k=0, or take the rules out"
        )
    if given.ranks.together is False and num_ranks() > 1:
        raise ConfigError(
            "ranks.together is False, and all ranks write one checkpoint together, as torchtitan's do; take it out"
        )
    return given


def _run_config(given: StagerConfig, config: Any) -> StagerConfig:
    overrides = [f"persistence.name={_NAME}"]
    if config.keep_latest_k > 0:
        overrides.append(f"retention.keep_latest={config.keep_latest_k}")
    return load_config(given, overrides)


def _removing_others(folder: str, limit: int) -> Callable[[Event], None]:
    """Return a listener that keeps no manager alive, so that one which is dropped is closed."""

    def on_event(event: Event) -> None:
        if isinstance(event, CommittedEvent):
            remove_surplus_of_others(folder, limit)

    return on_event
