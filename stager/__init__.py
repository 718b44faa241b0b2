"""Checkpoint staging for PyTorch that training does not wait for.

    from stager import Checkpointer

    with Checkpointer("runs/gpt") as ckpt:
        resumed = ckpt.load(into={"model": model, "optimizer": optimizer})
        for step in range(resumed.step + 1 if resumed else 0, steps):
            ...
            if step % 100 == 0:
                ckpt.save(step, {"model": model, "optimizer": optimizer})

``__init__.pyi`` names everything public, for type checkers and for this file. Names are imported when they are first used,
so that ``stager --help`` does not import torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

from stager.workers.platform_check import check_platform

check_platform(sys.platform)  # before anything that needs Linux is imported

with open(f"{__file__}i", encoding="utf-8") as _stub:  # each line: from MODULE import NAME as NAME
    _MODULE_OF = {line.split()[3]: line.split()[1] for line in _stub if line.startswith("from ")}

_NOT_IN_ALL = {"Event", "_ReplicationStager"}  # one would hide names of others, the other is private to torch
__all__ = [name for name in _MODULE_OF if name not in _NOT_IN_ALL]


def __getattr__(name: str) -> Any:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module 'stager' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(module), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
