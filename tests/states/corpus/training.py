"""What torch's own training tools give as their state."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.states.corpus.registry import state, values
from tests.states.corpus.tensors import rand


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


def stepped(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> torch.optim.Optimizer:
    """An optimizer that has taken a step."""
    parameters = list(model().parameters())
    optimizer = make(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(lambda: 0.5)  # type: ignore[arg-type]  # LBFGS needs a closure
    return optimizer


_OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd-momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, amsgrad=True),
    "adamw": torch.optim.AdamW,
    "adamw-capturable": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.1), capturable=False, foreach=False),
    "adamax": torch.optim.Adamax,
    "adagrad": torch.optim.Adagrad,
    "adadelta": torch.optim.Adadelta,
    "adafactor": torch.optim.Adafactor,
    "asgd": torch.optim.ASGD,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "rmsprop": lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True),
    "rprop": torch.optim.Rprop,
    "lbfgs": lambda p: torch.optim.LBFGS(p, max_iter=2),
    "groups": lambda p: torch.optim.AdamW([{"params": p[:1], "lr": 0.1, "name": "a"}, {"params": p[1:]}]),
}


def _state_of(make: Any) -> Any:
    return lambda: stepped(make).state_dict()


values("optimizers", {f"optimizer-{name}": _state_of(make) for name, make in _OPTIMIZERS.items()})


class Lookahead(torch.optim.SGD):
    """Its state has tuples as keys."""

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        state["slow"] = {
            (g, i): p.detach() for g, group in enumerate(self.param_groups) for i, p in enumerate(group["params"])
        }
        return state


@state("optimizer-lookahead", "optimizers")
def _lookahead() -> dict[str, Any]:
    return {"x": stepped(lambda p: Lookahead(p, 0.1)).state_dict()}


@state("optimizer-object", "optimizers", plain=lambda: {"x": stepped(torch.optim.AdamW).state_dict()})
def _optimizer() -> dict[str, Any]:
    return {"x": stepped(torch.optim.AdamW)}


_SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, 3),
    "multi-step": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [1, 1, 5]),  # a Counter
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
    "one-cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=10),
    "cyclic": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.1, 0.2),
    "plateau": torch.optim.lr_scheduler.ReduceLROnPlateau,
    "warm-restarts": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, _half),
    "lambda-object": lambda o: torch.optim.lr_scheduler.LambdaLR(o, Warmup(3)),
    "sequential": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o, [torch.optim.lr_scheduler.ConstantLR(o), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "chained": lambda o: torch.optim.lr_scheduler.ChainedScheduler([torch.optim.lr_scheduler.ConstantLR(o)]),
}


def _half(epoch: int) -> float:
    return 0.5


class Warmup:
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __call__(self, epoch: int) -> float:
        return min(1.0, epoch / self.steps)


def _scheduler(make: Any) -> Any:
    def made() -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer = stepped(lambda p: torch.optim.SGD(p, 0.1, momentum=0.9))
            scheduler = make(optimizer)
            scheduler.step(*([0.5] if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) else []))
            return scheduler.state_dict()

    return made


values("schedulers", {f"scheduler-{name}": _scheduler(make) for name, make in _SCHEDULERS.items()})


def _ema() -> dict[str, Any]:
    ema = torch.optim.swa_utils.AveragedModel(model(), multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    ema.update_parameters(model())
    return ema.state_dict()


def _scaler() -> dict[str, Any]:
    return torch.amp.GradScaler("cpu", init_scale=128.0).state_dict()


def _parametrized() -> Any:
    return nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)).state_dict()


def _spectral() -> Any:
    return nn.utils.parametrizations.spectral_norm(nn.Linear(3, 2)).state_dict()


def _pruned() -> Any:
    from torch.nn.utils import prune

    layer = nn.Linear(3, 2)
    prune.l1_unstructured(layer, "weight", 0.5)
    return layer.state_dict()


class ExtraState(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"calls": 3, "scale": torch.tensor(2.0)}

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


def _lora() -> dict[str, Any]:
    base = model()
    return {"base_model.model." + name: value for name, value in base.state_dict().items()}


def _tied_model() -> dict[str, Any]:
    embed, head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
    head.weight = embed.weight
    return nn.ModuleDict({"embed": embed, "head": head}).state_dict()


values(
    "modules",
    {
        "module-state-dict": lambda: model().state_dict(),
        "module-state-dict-keep-vars": lambda: model().state_dict(keep_vars=True),
        "module-deepcopy": lambda: copy.deepcopy(model().state_dict()),
        "module-half": lambda: model().half().state_dict(),
        "module-tied": _tied_model,
        "module-extra-state": lambda: ExtraState(2, 2).state_dict(),
        "module-weight-norm": _parametrized,
        "module-spectral-norm": _spectral,
        "module-pruned": _pruned,
        "module-ema": _ema,
        "module-prefixed": _lora,
        "module-lstm": lambda: nn.LSTM(3, 2, 2).state_dict(),
        "module-parameters-list": lambda: list(model().parameters()),
        "grad-scaler": _scaler,
        "generator-state": lambda: torch.Generator().manual_seed(3).get_state(),
    },
)


@state("module-itself", "modules", plain=lambda: {"x": model().state_dict()})
def _module() -> dict[str, Any]:
    return {"x": model()}


class Loader:
    """As torchdata's stateful data loader: it holds tuples of counters, an rng state and samples."""

    def state_dict(self) -> dict[str, Any]:
        return {
            "_snapshot": {"worker_0": {"fetcher_state": None, "dataset_state": (3, 4)}, "_step": 7},
            "_rng": torch.get_rng_state(),
            "_iterator_finished": False,
            "buffer": [(rand(2), 1), (rand(2), 0)],
        }

    def load_state_dict(self, state: Any) -> None:
        self.state = state


@state("data-loader", "data loaders", plain=lambda: {"x": Loader().state_dict()})
def _loader() -> dict[str, Any]:
    return {"x": Loader()}


@state("whole-program", "modules")
def _program() -> dict[str, Any]:
    optimizer = stepped(torch.optim.AdamW)
    return {
        "model": model().state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": {"torch": torch.get_rng_state(), "python": (3, (1, 2, 3), None)},
        "args": {"lr": 0.1, "betas": (0.9, 0.999), "name": "run", "resume": None},
        "epoch": 3,
        "best": float("inf"),
    }
