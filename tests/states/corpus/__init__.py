"""The corpus: states that training programs hold, one file for each field that they come from."""

from __future__ import annotations

from tests.states.corpus import (
    aliasing,
    arrays,
    layouts,
    mappings,
    objects,
    python_values,
    settings,
    storages,
    tensors,
    training,
    wrappers,
)
from tests.states.corpus.registry import Expect, State, registered

__all__ = ["CORPUS", "Expect", "State"]

_FIELDS = (
    tensors,
    layouts,
    storages,
    wrappers,
    aliasing,
    mappings,
    python_values,
    objects,
    arrays,
    training,
    settings,
)

CORPUS: dict[str, State] = {one.name: one for one in registered()}
