"""Restoring in place, for the tests of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stager import StateMismatchError
from tests.persistence.tasks import restorer, save
from tests.states import bits


def restore(run_dir: Path, state: dict[str, Any], into: dict[str, Any], strict: bool = True, **options: Any) -> None:
    restorer(save(run_dir, state, **options)).load_into(into, strict)


def refused(run_dir: Path, state: dict[str, Any], into: dict[str, Any], message: str, strict: bool = True) -> None:
    """It is refused with this message, and nothing of ``into`` is changed."""
    before = contents(into)
    with pytest.raises(StateMismatchError, match=message) as raised:
        restore(run_dir, state, into, strict)
    assert "nothing was changed" in str(raised.value)
    assert contents(into) == before


def contents(value: Any) -> Any:
    """Values, identities and versions of everything in it."""
    if isinstance(value, torch.Tensor):
        plain = value.layout is torch.strided and not value.is_meta
        return id(value), value._version, bits(value) if plain else None
    if isinstance(value, nn.Module):
        return id(value), contents(value.state_dict(keep_vars=True))
    if isinstance(value, torch.optim.Optimizer):
        return id(value), contents(list(value.state.values())), repr(value)
    if hasattr(value, "items"):
        return {k: contents(v) for k, v in value.items()}
    return [contents(v) for v in value] if isinstance(value, (list, tuple)) else (id(value), repr(value))
