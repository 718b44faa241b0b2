"""A CUDA runtime for machines without one: what pins memory asks it instead."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stager.workers.device import accelerator, cuda, host_memory


def install(monkeypatch: pytest.MonkeyPatch, runtime: Any, on_clear: Callable[[], None] = lambda: None) -> None:
    """
    Args:
        runtime: has ``cudaHostRegister`` and ``cudaHostUnregister``.
        on_clear: called when the error of a failed call is cleared.
    """
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(cuda, "clear_error", on_clear)
    monkeypatch.setattr(accelerator, "current", lambda: torch.device("cuda"))
    monkeypatch.setattr(host_memory, "_state", SimpleNamespace(warned=False))
