"""The small files of a Trainer's checkpoint: what lies beside the weights in a directory that ``from_pretrained()`` reads.

trainer_state.json                     the TrainerState
training_args.bin                      the TrainingArguments, by ``torch.save``
config.json, generation_config.json    of a PreTrainedModel
adapter_config.json                    of a PeftModel's default adapter; those of others: adapter_config.NAME.json
tokenizer.json, ...                    what the processing class saves
"""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import logging
import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_callback import ExportableState

from stager.integrations.transformers_parts.peft_adapters import is_peft_model

logger = logging.getLogger("stager")

_ADAPTER_CONFIG = "adapter_config.json"


class TrainerFiles:
    """Makes the files of each checkpoint. Those of the processing class are made again only when it has changed its size.

    Args:
        trainer: whose files they are.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._processing: tuple[Any, int, dict[str, bytes]] | None = None  # whose, its size, and its files

    def make(self) -> dict[str, bytes]:
        """Return the files as they are now, by their names."""
        trainer = self._trainer
        return {
            **self._files_of_processing(),
            **files_of_model(trainer.model),
            TRAINING_ARGS_NAME: _saved(trainer.args),
            TRAINER_STATE_NAME: trainer_state_json(trainer),
        }

    def _files_of_processing(self) -> dict[str, bytes]:
        processing = self._trainer.processing_class
        if processing is None:
            processing = getattr(self._trainer.data_collator, "tokenizer", None)
        if processing is None:
            return {}
        size = len(processing) if hasattr(processing, "__len__") else 0
        kept = self._processing
        if kept is None or kept[0] is not processing or kept[1] != size:
            self._processing = kept = (processing, size, _written(processing.save_pretrained))
        return kept[2]


def files_of_model(model: Any) -> dict[str, bytes]:
    """Return what the model's ``save_pretrained()`` writes beside the weights."""
    model = uncompiled(model)
    if is_peft_model(model):
        return _files_of_adapters(model)
    if not isinstance(model, PreTrainedModel):
        return {}
    return _written(lambda directory: _write_configuration(model, directory))


def uncompiled(model: Any) -> Any:
    """Return the module of ``torch.compile(module)``: the names of its weights do not depend on the compiler."""
    return getattr(model, "_orig_mod", model)


def _write_configuration(model: Any, directory: str) -> None:
    config = copy.copy(model.config)
    config.architectures = [type(model).__name__.removeprefix("FSDP")]
    config.dtype = str(model.dtype).removeprefix("torch.")
    if model._auto_class is not None:  # code of the user's, which from_pretrained() needs
        custom_object_save(model, directory, config=config)
    config.save_pretrained(directory)
    if model.can_generate():
        model.generation_config.save_pretrained(directory)


def _files_of_adapters(model: Any) -> dict[str, bytes]:
    found = {}
    for name, own in model.peft_config.items():
        config = copy.copy(own)
        config.inference_mode = True
        if config.base_model_name_or_path is None:
            base = model.base_model if config.is_prompt_learning else model.base_model.model
            config.base_model_name_or_path = getattr(base, "name_or_path", None) or None
        data = _written(config.save_pretrained)[_ADAPTER_CONFIG]
        found[_ADAPTER_CONFIG if name == "default" else f"adapter_config.{name}.json"] = data
    return found


def trainer_state_json(trainer: Any) -> bytes:
    """Serialise the TrainerState, with what the callbacks export, as ``TrainerState.load_from_json()`` reads it.

    ``TrainerState.save_to_json()`` copies every entry of the log, and indents in Python: for 10,000 entries that takes
    longer than writing a checkpoint should hold up a loop. This is one line.
    """
    state = trainer.state
    exported: dict[str, list[Any]] = {}
    for one in [*trainer.callback_handler.callbacks, trainer.control]:
        if isinstance(one, ExportableState):
            exported.setdefault(type(one).__name__, []).append(one.state())
    state.stateful_callbacks.update({name: of[0] if len(of) == 1 else of for name, of in exported.items()})
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return json.dumps(fields, sort_keys=True).encode() + b"\n"


def _saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _written(write: Callable[[str], Any]) -> dict[str, bytes]:
    """Return the files that ``write(directory)`` makes."""
    found = {}
    with tempfile.TemporaryDirectory(prefix="stager-") as directory:
        write(directory)
        for entry in os.scandir(directory):
            if not entry.is_file():
                logger.warning("%s is left out of the checkpoint, whose files lie in one directory", entry.name)
                continue
            with open(entry.path, "rb") as file:
                found[entry.name] = file.read()
    return found
