"""torchtitan's own Trainer on a machine without an accelerator: it takes the processor for one, with gloo.

torchtitan asks for the accelerator once, when ``torchtitan.tools.utils`` is imported; without one it takes CUDA, and its
Trainer fails. Importing this module imports that one with the processor as the answer. :func:`prepare` does what is left, in
a process that trains and does nothing else.
"""

from __future__ import annotations

import os
import socket
from types import SimpleNamespace
from typing import Any

import torch
import torch._utils
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

_torch: Any = torch
_answer = _torch._utils._get_available_device_type
_torch._utils._get_available_device_type = lambda: "cpu"
try:
    import torchtitan.tools.utils
finally:
    _torch._utils._get_available_device_type = _answer


def prepare() -> None:
    """Give the processor what torchtitan asks an accelerator for."""
    assert torchtitan.tools.utils.device_type == "cpu", "torchtitan was imported before this module"
    cpu = _torch.cpu
    cpu.get_device_name = lambda *_: "processor"
    cpu.get_device_properties = lambda *_: SimpleNamespace(total_memory=1 << 30)
    cpu.memory_stats = lambda *_: {}
    cpu.reset_peak_memory_stats = cpu.empty_cache = lambda *_: None
    cpu.current_device = lambda: 0
    if not hasattr(dist, "set_timeout"):  # torch 2.14
        dist.set_timeout = lambda *_: None  # type: ignore[attr-defined]  # see above
    _sum_in_gloo()
    torch.set_num_threads(1)
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}.items():
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            os.environ["MASTER_PORT"] = str(free.getsockname()[1])


def _sum_in_gloo() -> None:
    """Let FSDP2 sum gradients and then divide them: gloo cannot do both at once, as torchtitan has it."""
    cls: Any = FSDPModule
    set_factor = cls.set_gradient_divide_factor

    def set_factor_and_sum(module: Any, factor: float) -> None:
        set_factor(module, factor)
        module.set_force_sum_reduction_for_comms(True)

    cls.set_gradient_divide_factor = set_factor_and_sum
