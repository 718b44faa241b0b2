"""What a load fills, in place: the whole state of a training, or only a model.

NOTE [ The optimizer's entries are loaded one by one ]
``OptimizersContainer.state_dict()`` is flat: ``state.layers.0.weight.exp_avg``. With pipeline parallelism each rank has the
entries of its own stages. An entry ``optimizer`` in ``into``, a plain dict, would become all of what was saved, of every
stage. So its entries stand at the top of ``into``, where a rank gets those that it has and no others; a renaming by
:func:`to_targets` leads there.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torchtitan.components.checkpointer import MODEL, OPTIMIZER

from stager.integrations.torchtitan_parts.contents import RNG
from stager.state.per_rank import PerRank
from stager.state.rng_state import RngState

_SAVED, _TARGET = f"{OPTIMIZER}.", f"{OPTIMIZER}/"


def to_targets(name: str) -> str:
    """Return the name in ``into`` of what has this name in a checkpoint."""
    return _TARGET + name[len(_SAVED) :] if name.startswith(_SAVED) else name


class TrainingState:
    """What a load fills with a whole checkpoint.

    Args:
        states: torchtitan's: ``model``, ``optimizer`` and so on.
        excluded: entries that are left as they are.
        with_rng: load the random numbers.
    """

    def __init__(self, states: Mapping[str, Any], excluded: Collection[str], *, with_rng: bool) -> None:
        left = {name: value for name, value in states.items() if name not in excluded}
        self._model, self._optimizers = left.pop(MODEL), left.pop(OPTIMIZER, None)
        self._model_state: dict[str, Any] = self._model.state_dict()
        self._rng = _HeldRng() if with_rng else None
        self.into: dict[str, Any] = {**left, **self._model_state}
        if self._optimizers is not None:
            self.into |= {_TARGET + name: value for name, value in self._optimizers.state_dict().items()}
        if self._rng is not None:
            self.into[RNG] = PerRank(self._rng)

    def finish(self) -> None:
        """Hand over what was loaded: the tensors have it, other values and random numbers not yet."""
        if self._optimizers is not None:
            names = [name for name in self.into if name.startswith(_TARGET)]
            self._optimizers.load_state_dict({name[len(_TARGET) :]: self.into[name] for name in names})
        self._model.load_state_dict({name: self.into[name] for name in self._model_state})
        if self._rng is not None:
            self._rng.restore()  # the last, so that nothing draws a number after it


class _HeldRng:
    """Random numbers that are restored when everything else is."""

    def __init__(self) -> None:
        self._found: Any = None

    def state_dict(self) -> Any:
        return RngState().state_dict()

    def load_state_dict(self, state: Any) -> None:
        self._found = state

    def restore(self) -> None:
        if self._found is not None:  # a rank that was not there when it was saved has none
            RngState().load_state_dict(self._found)


def in_stored_dtypes(state: Mapping[str, Any], dtypes: Mapping[str, torch.dtype]) -> dict[str, Any]:
    """Return what to load a model into: its tensors, or new ones where another dtype was saved.

    Args:
        dtypes: of the checkpoint, by name.
    """
    return {
        name: torch.empty_like(value, dtype=dtypes[name])
        if isinstance(value, torch.Tensor) and dtypes.get(name, value.dtype) != value.dtype
        else value
        for name, value in state.items()
    }
