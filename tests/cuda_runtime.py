"""A CUDA runtime for machines without one: what pins memory asks it instead."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stager.workers.memory import pinning


def install(monkeypatch: pytest.MonkeyPatch, runtime: Any, on_clear: Callable[[], None] = lambda: None) -> None:
    """
    Args:
        runtime: has ``cudaHostRegister`` and ``cudaHostUnregister``.
        on_clear: called when the error of a failed call is cleared.
    """
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(pinning, "_clear_error", on_clear)
    monkeypatch.setattr(pinning, "_state", SimpleNamespace(warned=False))
