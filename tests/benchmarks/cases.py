"""The cases, by name.

torch is imported where it is used: the process that starts the children and reads their memory must not map its libraries,
or it would take a share of them in every PSS.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from tests.benchmarks.workload import Workload

if TYPE_CHECKING:
    import torch

MIB = 1 << 20
_ALL = (
    "stager",
    "stager-cold",
    "stager-guarded",
    "stager-workers",
    "stager-guarded-workers",
    "torch-save",
    "dcp-save",
    "dcp-thread",
    "dcp-process",
    "dcp-process-shared",
    "torch-checkpointing",
    "torch-checkpointing-buffered",
    "torchsnapshot",
)
_LOOP = (*(name for name in _ALL if name not in {"stager-cold", "dcp-save"}), "raw-write", "nothing")
_SOAK = tuple(name for name in _ALL if name.startswith("stager") and name != "stager-cold")


class Kind(Enum):
    """What is done with a case."""

    SAVES = "saves"
    LOOP = "training loop"
    SOAK = "soak"


@dataclass(frozen=True, slots=True)
class Case:
    """``make(scale)`` builds the state, ``scale`` 1.0 being the published size.

    Attributes:
        nbytes: of the state at scale 1.0, about.
        nofile: limit of open descriptors that its children run under; None: as it is.
        needs: module without which the state cannot be built.
        peers: who takes part.
    """

    name: str
    what: str
    kind: Kind
    nbytes: int
    make: Callable[[float], Workload]
    nofile: int | None = None
    needs: str | None = None
    peers: tuple[str, ...] = _ALL


def _gpt2(scale: float) -> Workload:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    width = 768 if scale >= 1 else max(12, int(768 * math.sqrt(scale)) // 12 * 12)
    config = GPT2Config(
        n_embd=width,
        n_layer=max(1, round(12 * min(1.0, math.sqrt(scale)))),
        vocab_size=50257 if scale >= 1 else max(100, int(50257 * math.sqrt(scale))),
    )
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    _one_step(optimizer)
    return Workload({"model": model, "optimizer": optimizer}, [optimizer], _floats(optimizer))


def _one_step(optimizer: torch.optim.Optimizer) -> None:
    """Fills the optimizer's state as one step of training does, without the forward and backward."""
    import torch

    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _floats(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    import torch

    parameters = [p.detach() for group in optimizer.param_groups for p in group["params"]]
    return parameters + [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)]


def _flat(count: int, length: int) -> Workload:
    """``count`` float32 tensors of ``length`` elements, all changed by one plain optimizer."""
    import torch

    tensors = {f"layers.{i}.weight": torch.randn(length) for i in range(count)}
    values = list(tensors.values())
    return Workload({"model": tensors}, [torch.optim.SGD(values, lr=0.1)], values)


def _big(scale: float) -> Workload:
    return _flat(72, max(1, int(1536 * MIB * scale) // 72 // 4))


def _small(scale: float) -> Workload:
    return _flat(max(1, int(20_000 * scale)), 256)


def _many(scale: float) -> Workload:
    return _flat(max(1, int(200_000 * scale)), 256)


def _lora(scale: float) -> Workload:
    """512 frozen tensors of 1.5 MiB; 1,024 adapters, 1 % of that, with AdamW's state beside them."""
    import torch

    count = max(1, int(512 * min(1.0, scale * 4)))
    frozen_length = max(1, int(768 * MIB * scale) // count // 4)
    adapter_length = max(1, frozen_length * count // 100 // (2 * count))
    frozen = {f"layers.{i}.weight": torch.randn(frozen_length) for i in range(count)}
    adapters = {f"layers.{i}.lora_{ab}": torch.randn(adapter_length) for i in range(count) for ab in "ab"}
    optimizer = torch.optim.AdamW(list(adapters.values()), lr=1e-4)
    _one_step(optimizer)
    return Workload({"model": {**frozen, **adapters}, "optimizer": optimizer}, [optimizer], _floats(optimizer))


def _loop(scale: float) -> Workload:
    """Eight square layers and AdamW: 32 Mi parameters, 384 MiB with the optimizer's state."""
    import torch

    width = max(16, int(2048 * math.sqrt(scale)))
    layers: list[torch.nn.Module] = []
    for _ in range(8):
        layers += [torch.nn.Linear(width, width, bias=False), torch.nn.GELU()]
    model = torch.nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    _one_step(optimizer)
    return Workload({"model": model, "optimizer": optimizer}, [optimizer], _floats(optimizer))


def _soak(scale: float) -> Workload:
    return _flat(64, 4096)


CASES = {
    case.name: case
    for case in (
        Case("gpt2", "GPT-2 124M and AdamW, random weights", Kind.SAVES, 1536 * MIB, _gpt2, needs="transformers"),
        Case("big", "1.5 GiB in 72 tensors", Kind.SAVES, 1536 * MIB, _big),
        Case("small", "20,000 tensors of 1 KiB", Kind.SAVES, 20 * MIB, _small),
        Case("many", "200,000 tensors of 1 KiB, 1,024 open files at most", Kind.SAVES, 200 * MIB, _many, nofile=1024),
        Case("lora", "512 frozen tensors, 1,024 adapters (1 %) and AdamW", Kind.SAVES, 800 * MIB, _lora),
        Case(
            "loop",
            "a training loop: 32 Mi parameters and AdamW, 384 MiB, one thread",
            Kind.LOOP,
            512 * MIB,
            _loop,
            peers=_LOOP,
        ),
        Case("soak", "thousands of saves of 64 tensors, 1 MiB", Kind.SOAK, MIB, _soak, peers=_SOAK),
    )
}
