"""What ``Accelerator.save_state()`` saves, as a state that a Checkpointer takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType

from stager.state.per_rank import PerRank
from stager.state.rng_state import RngState
from stager.state.stateful import is_stateful
from stager.workers.errors import ArgumentError, UsageError

# In these, the engine saves itself: its parts lie in objects that have no state_dict() to take.
_SAVE_THEMSELVES = ("DEEPSPEED", "MEGATRON_LM", "XLA")


def state(accelerator: Accelerator) -> dict[str, Any]:
    """Return what ``accelerator.save_state()`` saves, for ``save()`` and ``load(into=)`` of a Checkpointer.

    The values are the objects themselves, so the mapping may be made once, after the last ``prepare()`` and
    ``register_for_checkpointing()``, or anew for each call. Names are those of Accelerate's files::

        model, model_1, ...            without DDP's and torch.compile's wrappers: keys have no "module." before them
        optimizer, optimizer_1, ...    torch's, which AcceleratedOptimizer wraps
        scheduler, scheduler_1, ...
        custom_checkpoint_0, ...       what register_for_checkpointing() was given
        scaler                         if there is one
        counters                       accelerator.step
        dataloader, dataloader_1, ...  of each rank: the epoch, and with use_stateful_dataloader the position in it
        random_states                  of each rank

    Args:
        accelerator: which has prepared all that is to be saved.

    Raises:
        UsageError: DeepSpeed, Megatron-LM, XLA or the first version of FSDP, which have to save for themselves.
        ArgumentError: something that was prepared or registered has no ``state_dict()`` and ``load_state_dict()``.
    """
    refuse_engines(accelerator)
    found: dict[str, Any] = {}
    for name, model in _named("model", accelerator._models):
        found[name] = _unwrapped(accelerator, model)
    for name, optimizer in _named("optimizer", accelerator._optimizers):
        found[name] = _stateful(name, torch_optimizer(optimizer))
    for name, scheduler in _named("scheduler", accelerator._schedulers):
        found[name] = _stateful(name, scheduler)
    for index, registered in enumerate(accelerator._custom_objects):
        name = f"custom_checkpoint_{index}"
        found[name] = _stateful(name, registered)
    if accelerator.scaler is not None:
        found["scaler"] = accelerator.scaler
    found["counters"] = _Counters(accelerator)
    for name, loader in _named("dataloader", accelerator._dataloaders):
        found[name] = PerRank(_Position(loader))
    found["random_states"] = PerRank(RngState())  # the last, so that nothing draws a number after it was restored
    return found


def _named(name: str, objects: list[Any]) -> Iterator[tuple[str, Any]]:
    for index, one in enumerate(objects):
        yield (name if index == 0 else f"{name}_{index}"), one


def refuse_engines(accelerator: Accelerator) -> None:
    """Raise UsageError if an engine trains that has to save for itself."""
    kind = accelerator.distributed_type
    if kind in [getattr(DistributedType, name) for name in _SAVE_THEMSELVES]:
        raise UsageError(
            f"the Accelerator runs {kind.value}, which saves its state itself, so that stager cannot take it; use "
            "accelerator.save_state()"
        )
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise UsageError(
            "the Accelerator runs the first version of FSDP, whose optimizer has other tensors on each rank under the same "
            "names; set fsdp_version=2 in FullyShardedDataParallelPlugin, or use accelerator.save_state()"
        )


def _unwrapped(accelerator: Accelerator, model: Any) -> Any:
    # One call takes off DDP, or torch.compile and DDP below it. Of torch.compile below DDP it takes off DDP only.
    while (inner := accelerator.unwrap_model(model, keep_torch_compile=False)) is not model:
        model = inner
    return model


def torch_optimizer(optimizer: Any) -> Any:
    """Return the optimizer of torch that Accelerate has wrapped."""
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer


def _stateful(name: str, value: Any) -> Any:
    """Return what stager can take the state of: the object, or, if only the object itself has the methods, a view of it."""
    if is_stateful(value):
        return value
    if callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None)):
        return _View(value)
    raise ArgumentError(
        f"{name} of the Accelerator is a {type(value).__name__}, which has no state_dict() and load_state_dict(); give it "
        "both, or do not prepare or register it"
    )


class _View:
    """The state of an object whose methods are attributes of its own, and not of its class."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def state_dict(self) -> Any:
        return self._value.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self._value.load_state_dict(state)


class _Counters:
    """How many batches of a gradient accumulation are done."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    def state_dict(self) -> dict[str, int]:
        return {"step": self._accelerator.step}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self._accelerator.step = state["step"]


class _Position:
    """Where a data loader is: the epoch to go on with, and, of a stateful one, the position in it."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def state_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {"epoch": self._epoch()}
        if self._is_stateful:
            found["position"] = self._loader.state_dict()
        return found

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["epoch"] is not None:
            self._loader.set_epoch(state["epoch"])
        if self._is_stateful and "position" in state:
            self._loader.load_state_dict(state["position"])

    @property
    def _is_stateful(self) -> bool:
        return bool(getattr(self._loader, "use_stateful_dataloader", False))

    def _epoch(self) -> int | None:
        """The epoch in which the next batch is. After the last batch, the loop over the loader is in the old one still."""
        epoch: int | None = getattr(self._loader, "iteration", None)
        if epoch is None:
            return None
        in_loop = any(one is self._loader for one in self._loader.gradient_state.dataloader_references)
        return epoch + 1 if in_loop and self._loader.end_of_dataloader else epoch
