"""What a checkpoint in torchtitan's folder has in it, whoever wrote it, and which is the newest to resume from.

torchtitan takes every name with ``step-8`` anywhere in it for the checkpoint of step 8 if it has ``.metadata`` in it, also
``old-step-8``. Here a checkpoint is ``step-8`` and nothing else.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torchtitan.components.checkpointer import DATALOADER, LR_SCHEDULER, OPTIMIZER, TRAIN_STATE

from stager.loading.dcp.stock_metadata import parse_stock_metadata
from stager.operations import verify
from stager.workers.checkpoint.directory.manifest_file import has_own_manifest
from stager.workers.checkpoint.directory.run_directory import SkippedCheckpoint
from stager.workers.checkpoint.storage.posix.files import read_small
from stager.workers.errors import CheckpointNotFoundError, CorruptCheckpointError, StagerError, StorageError
from stager.workers.wording import first_of

logger = logging.getLogger("stager")

RNG = "rng"
"""The entry of the random numbers, which torchtitan does not save."""

_METADATA = ".metadata"
_HF_INDEX = ".safetensors.index.json"
_NAME = re.compile(r"step-(0|[1-9][0-9]*)")
_SHOWN_PROBLEMS = 3
_SHOWN_STEPS = 5
_OF_TRAINING = frozenset({OPTIMIZER, LR_SCHEDULER, DATALOADER, TRAIN_STATE})


@dataclass(frozen=True, slots=True)
class Contents:
    """What a checkpoint has in it, as its ``.metadata`` says.

    Attributes:
        path: of its directory.
        is_ours: stager has written it.
        names: the entries at the top: each of the model's tensors, ``optimizer``, ``train_state`` and so on.
        dtypes: of the tensors, by their names.
        num_ranks: which have saved random numbers; 0: there are none.
    """

    path: str
    is_ours: bool
    names: frozenset[str]
    dtypes: Mapping[str, torch.dtype]
    num_ranks: int

    @property
    def is_of_training(self) -> bool:
        """Whether a training can go on from it: it has more than the model."""
        return not self.names.isdisjoint(_OF_TRAINING)


def contents_of(path: str) -> Contents:
    """Read what a checkpoint has in it. Runs no code from it.

    Raises:
        CheckpointNotFoundError: there is none; says what there is.
        CorruptCheckpointError: its ``.metadata`` is damaged.
        StorageError: it cannot be read.
    """
    metadata_path = os.path.join(path, _METADATA)
    try:
        data = read_small(metadata_path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointNotFoundError(error.errno, f"is no checkpoint: {_what_it_is(path)}", path) from error
    except OSError as error:
        raise StorageError(error.errno, f"cannot be read: {error.strerror}", metadata_path) from error
    metadata = parse_stock_metadata(data, metadata_path)
    stored = metadata.state_dict_metadata
    keys = metadata.planner_data or {name: (name,) for name in stored}
    paths = [key for key in keys.values() if key]
    return Contents(
        path,
        has_own_manifest(path),
        frozenset(str(key[0]) for key in paths),
        {name: one.properties.dtype for name, one in stored.items() if isinstance(one, TensorStorageMetadata)},
        len({key[1] for key in paths if key[0] == RNG and len(key) > 1}),
    )


def _what_it_is(path: str) -> str:
    if not os.path.isdir(path):
        return "there is no such directory"
    if holds_weights(path):
        return "it has weights in the layout of Hugging Face; load them with initial_load_in_hf and initial_load_path"
    return "it has no .metadata, so its save was not finished, or it is something else"


def holds_weights(path: str) -> bool:
    """Tell whether a directory has files of Hugging Face's layout."""
    return any(name.endswith((".safetensors", _HF_INDEX)) for name in os.listdir(path))


# -- the folder -----------------------------------------------------------------------------------------------------


def step_name(step: int) -> str:
    """Return the name of a step's checkpoint."""
    return f"step-{step}"


def step_path(folder: str, step: int) -> str:
    """Return the path of a step's checkpoint."""
    return os.path.join(folder, step_name(step))


def step_of(path: str) -> int | None:
    """Return the step that a checkpoint's name tells."""
    match = _NAME.fullmatch(os.path.basename(path))
    return None if match is None else int(match[1])


def steps_in(folder: str) -> list[int]:
    """List the steps of the committed checkpoints in a folder, newest first, stager's and torchtitan's own.

    Of stager's, also those that have lost ``.metadata``: they are damaged.
    """
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = [int(match[1]) for name in names if (match := _NAME.fullmatch(name)) is not None]
    return sorted((step for step in found if _is_committed(step_path(folder, step))), reverse=True)


def _is_committed(path: str) -> bool:
    return os.path.isfile(os.path.join(path, _METADATA)) or has_own_manifest(path)


@dataclass(frozen=True, slots=True)
class Choice:
    """A checkpoint of a folder, to be loaded: its step, and what it has in it."""

    step: int
    contents: Contents


def candidates_in(folder: str) -> Iterator[Choice | SkippedCheckpoint]:
    """Yield the checkpoints from which a training can go on, newest first, and those that are found damaged.

    A seed checkpoint (step 0) is one, and has the model only. A higher step with the model only is the result of a training
    that has ended (``last_save_model_only``), and is passed over.
    """
    steps = steps_in(folder)
    for number, step in enumerate(steps):
        path = step_path(folder, step)
        try:
            contents = contents_of(path)
            if contents.is_of_training and contents.is_ours and _comes_to_seed(folder, steps[number + 1 :]):
                _verify(path)
        except StagerError as error:
            yield passed_over(path, str(error))
            continue
        if step == 0 or contents.is_of_training:
            yield Choice(step, contents)
            continue
        logger.warning(
            "%s is passed over: it has the model only, as the last save of a training that ended (last_save_model_only). "
            "To begin from it, set initial_load_path to it, and another folder",
            path,
        )


def passed_over(path: str, problem: str) -> SkippedCheckpoint:
    """Note that a checkpoint of a folder is damaged. Its path is not repeated in the reason."""
    reason = problem.removeprefix(f"{path}{os.sep}").removeprefix(f"{path}: ")
    return SkippedCheckpoint(os.path.basename(path), reason, step_of(path))


def _comes_to_seed(folder: str, steps: Sequence[int]) -> bool:
    """Tell whether the next of these steps to be loaded is a seed checkpoint."""
    return next(filter(lambda step: _is_loadable(folder, step), steps), None) == 0


def _is_loadable(folder: str, step: int) -> bool:
    with suppress(StagerError):
        return contents_of(step_path(folder, step)).is_of_training or step == 0
    return False


def _verify(path: str) -> None:
    """Hash a checkpoint before anything of it is loaded.

    What a damaged one has overwritten, the next one overwrites again. A seed checkpoint does not: it has no optimizer.

    Raises:
        CorruptCheckpointError: it is damaged.
    """
    report = verify(path)
    if not report.ok:
        problems = [problem.removeprefix(f"{path}{os.sep}") for problem in report.problems]
        raise CorruptCheckpointError(path, "; ".join(problems[:_SHOWN_PROBLEMS]))


def chosen_in(folder: str, step: int) -> Choice:
    """Choose the checkpoint of a step.

    Raises:
        CheckpointNotFoundError: there is none; says which there are.
        Exception: as of :func:`contents_of`.
    """
    try:
        return Choice(step, contents_of(step_path(folder, step)))
    except CheckpointNotFoundError as error:
        others = ", ".join(map(str, reversed(steps_in(folder)))) or "none"
        raise CheckpointNotFoundError(
            error.errno,
            f"load_step={step}: {error.strerror}; the steps with a checkpoint are: {others}",
            error.filename,
        ) from error


def instead_of(folder: str, damaged: Collection[int]) -> str:
    """Say what to do about steps that are damaged."""
    others = [str(step) for step in steps_in(folder) if step not in damaged and _is_loadable(folder, step)]
    if others:
        return f"put it back from a copy, or set load_step to another step: {first_of(others, _SHOWN_STEPS)}"
    which = "it" if len(damaged) == 1 else "one of them"
    them = "it" if len(damaged) == 1 else "them all"
    return f"{folder} has no other one to go on from: put {which} back from a copy, or remove {them} to begin anew"
