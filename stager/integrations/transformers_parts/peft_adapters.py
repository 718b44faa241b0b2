"""Models of peft: their adapters alone are saved, by the names that ``adapter_model.safetensors`` has."""

from __future__ import annotations

import sys
from typing import Any

from stager import load_checkpoint
from stager.workers.errors import StateMismatchError

ADAPTERS = "adapters"
"""Their entry in the state: by the adapters' names, then by those of their weights."""


def is_peft_model(model: Any) -> bool:
    """Tell whether a model is one of peft's. Does not import peft: without it there is no such model."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


def adapters_of(model: Any) -> dict[str, Any]:
    """Return the weights of each adapter: tensors of the model, not copies."""
    weights = sys.modules["peft"].get_peft_model_state_dict
    return {name: weights(model, adapter_name=name) for name in model.peft_config}


def load_adapters(path: str, model: Any) -> None:
    """Fill the adapters of a model from a checkpoint.

    Raises:
        StateMismatchError: the model has other adapters than the checkpoint, or others weights in one.
        Exception: as :func:`stager.load_checkpoint`.
    """
    saved = load_checkpoint(path, keys=ADAPTERS).state.get(ADAPTERS, {})
    own = adapters_of(model)
    if saved.keys() != own.keys():
        raise StateMismatchError(
            f"{path} has the adapters {sorted(saved)}, and the model has {sorted(own)}; give the Trainer a model with the "
            "adapters that were saved"
        )
    for name, weights in saved.items():
        if differing := sorted(weights.keys() ^ own[name].keys()):
            raise StateMismatchError(
                f"{path}: the adapter {name!r} has other weights than the model's, {differing[0]} among them; give the "
                "Trainer a model whose adapter has the same configuration"
            )
        sys.modules["peft"].set_peft_model_state_dict(model, weights, adapter_name=name)
