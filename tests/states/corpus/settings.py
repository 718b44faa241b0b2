"""Settings of torch's for the whole process, which must not change what is saved or loaded."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.serialization import config

from tests.states.corpus.registry import state
from tests.states.corpus.tensors import rand


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


@contextlib.contextmanager
def _set(change: Callable[[Any], Any], value: Any, back: Any) -> Iterator[None]:
    change(value)
    try:
        yield
    finally:
        change(back)


@contextlib.contextmanager
def _attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


_SETTINGS: dict[str, Callable[[], Any]] = {
    "force-weights-only": lambda: _environment("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1"),
    "force-no-weights-only": lambda: _environment("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1"),
    "default-dtype": lambda: _set(torch.set_default_dtype, torch.float64, torch.float32),
    "default-device-meta": lambda: torch.device("meta"),
    "inference-mode": torch.inference_mode,
    "no-grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu"),
    "deterministic": _deterministic,
    "crc32-off": lambda: _set(torch.serialization.set_crc32_options, False, True),
    "endianness-big": lambda: _set(
        torch.serialization.set_default_load_endianness, torch.serialization.LoadEndianness.BIG, None
    ),
    "mmap": lambda: _attribute(config.load, "mmap", True),
    "calculate-offsets": lambda: _attribute(config.load, "calculate_storage_offsets", True),
    "storage-alignment": lambda: _attribute(config.save, "storage_alignment", 4096),
    "skip-data": torch.serialization.skip_data,
    "overwrite-params-on-conversion": lambda: _set(
        torch.__future__.set_overwrite_module_params_on_conversion, True, False
    ),
    "swap-module-params": lambda: _set(torch.__future__.set_swap_module_params_on_conversion, True, False),
    "vmap-fallback-off": lambda: _set(torch._C._functorch._set_vmap_fallback_enabled, False, True),
    "fake-mode": lambda: __import__("torch._subclasses.fake_tensor", fromlist=["x"]).FakeTensorMode(
        allow_non_fake_inputs=True
    ),
}


def _state() -> dict[str, Any]:
    return {
        "weight": torch.nn.Parameter(_REAL.clone()),
        "list": [_REAL.clone(), 1],
        "tuple": (_REAL.clone(), "a"),
        "sparse": _SPARSE,
        "when": datetime.date(2026, 1, 2),
        "empty": _REAL[:0],
        "large": _LARGE,
    }


_REAL = rand(3, 2)
_SPARSE = torch.eye(3).to_sparse()
_LARGE = rand(1 << 18)

for _name, _around in _SETTINGS.items():
    state(f"setting-{_name}", "settings", around=_around, is_dangerous=_name == "fake-mode")(_state)
