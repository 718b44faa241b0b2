"""``python -m tests.states.writers --saves 100``: ways to write behind the guard, and what becomes of the checkpoints.

Each way is a small training loop with a guarded optimizer. A save of it goes like this:

    1. save() returns; what is guarded is not copied yet.
    2. Every other save: the staging thread is held before it copies, so that what is written next is torn for certain.
       The saves between race with the copy.
    3. The way writes, as such programs do: between ``save()`` and the step.
    4. The staging thread goes on. The save is committed, or fails with ``TornSnapshotError``.
    5. The guarded step.

A committed checkpoint must hold the values at ``save()``, bit for bit.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from stager import Checkpointer, TornSnapshotError
from stager.saving.saver import Saver
from tests.faults import Faults, faults_of_this_process
from tests.states import same
from tests.waiting import wait_until_blocked


@dataclass
class Way:
    """A program that writes behind the guard.

    Attributes:
        state: what is saved; ``quiet`` is guarded, and nothing but the step writes to it.
        guarded: the guarded optimizer.
        write: called between ``save()`` and the step.
        tears: words of the names of all tensors that it tears; none if it need not tear any.
        waits: whether ``write`` steps the guarded optimizer, and so waits for the copy.
    """

    state: dict[str, Any]
    guarded: torch.optim.Optimizer
    write: Callable[[], None]
    tears: tuple[str, ...] = ()
    waits: bool = False


class Net(nn.Module):
    """An embedding and two layers; ``quiet`` takes no part in the forward pass."""

    def __init__(self, max_norm: float | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(500, 32, max_norm=max_norm)
        self.out = nn.Linear(32, 300)
        self.quiet = nn.Parameter(torch.ones(1000))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.emb(x))

    def loss(self) -> torch.Tensor:
        return self(torch.randint(0, 500, (64,))).square().mean()

    def noisy(self) -> list[nn.Parameter]:
        return [self.emb.weight, self.out.weight, self.out.bias]


_NOISY = ("emb.weight", "out.weight", "out.bias")


def _base(max_norm: float | None = None) -> tuple[Net, torch.optim.Optimizer]:
    net = Net(max_norm)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return net, optimizer


def _way(net: nn.Module, optimizer: torch.optim.Optimizer, write: Callable[[], Any], *tears: str, **more: Any) -> Way:
    return Way({"model": net, "opt": optimizer, **more}, optimizer, write, tears)


def max_norm_in_forward() -> Way:
    net, optimizer = _base(max_norm=1.0)

    def write() -> None:
        net.loss()

    return _way(net, optimizer, write, "emb.weight")


def average_swapped_in_through_data() -> Way:
    net, optimizer = _base()
    average = [torch.randn_like(parameter) for parameter in net.noisy()]

    def write() -> None:
        for parameter, mean in zip(net.noisy(), average, strict=True):
            before = parameter.data.clone()
            parameter.data.copy_(mean)
            mean.copy_(before)

    return _way(net, optimizer, write, *_NOISY)


def in_place_without_gradient() -> Way:
    net, optimizer = _base()

    @torch.no_grad()
    def write() -> None:
        net.emb.weight[3].mul_(1.5)  # one row: no sample need lie in it
        net.out.bias.clamp_(-0.01, 0.01).add_(torch.rand(()))

    return _way(net, optimizer, write, "emb.weight", "out.bias")


def foreach_without_gradient() -> Way:
    net, optimizer = _base()

    @torch.no_grad()
    def write() -> None:
        torch._foreach_add_(net.noisy(), 0.25)

    return _way(net, optimizer, write, *_NOISY)


def numpy_view() -> Way:
    net, optimizer = _base()
    views = [parameter.detach().numpy() for parameter in net.noisy()]

    def write() -> None:
        for view in views:
            view[:] = view + 0.5

    return _way(net, optimizer, write, *_NOISY)


def guarded_optimizer_stepped_in_backward() -> Way:
    net, optimizer = _base()
    net.out.bias.register_post_accumulate_grad_hook(lambda _: optimizer.step())
    way = _way(net, optimizer, lambda: net.loss().backward())
    way.waits = True
    return way


def other_optimizers_stepped_in_backward() -> Way:
    """One small optimizer for each parameter, none of them guarded."""
    net, optimizer = _base()
    small = {parameter: torch.optim.SGD([parameter], lr=0.1, foreach=False) for parameter in net.noisy()}
    for parameter in small:
        parameter.register_post_accumulate_grad_hook(lambda p: small[p].step())
    return _way(net, optimizer, lambda: net.loss().backward(), *_NOISY)


class ScheduleFree(torch.optim.SGD):
    """As schedule-free optimizers do: ``eval()`` turns the parameters into averages, ``train()`` turns them back."""

    def swap(self, weight: float) -> None:
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                if "z" in self.state[parameter]:
                    parameter.lerp_(end=self.state[parameter]["z"], weight=weight)


def schedule_free() -> Way:
    net, _ = _base()
    optimizer = ScheduleFree(net.parameters(), lr=0.1)
    for parameter in net.noisy():
        optimizer.state[parameter]["z"] = torch.randn_like(parameter)

    def write() -> None:
        optimizer.swap(1 - 1 / 0.9)  # eval()
        optimizer.swap(0.05)  # train(), after a while

    return _way(net, optimizer, write, *_NOISY)


def second_optimizer() -> Way:
    net, optimizer = _base()
    second = torch.optim.Adam(net.noisy(), lr=0.1, fused=True)

    def write() -> None:
        net.loss().backward()
        second.step()

    return _way(net, optimizer, write, *_NOISY)


def spectral_norm_in_forward() -> Way:
    """Its buffers change in forward. They are not guarded."""
    net, _ = _base()
    net.out = nn.utils.parametrizations.spectral_norm(net.out)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    return _way(net, optimizer, net.loss)


def averaged_model() -> Way:
    """Not guarded, unless an optimizer has its parameters."""
    net, optimizer = _base()
    average = AveragedModel(net)
    return _way(net, optimizer, lambda: average.update_parameters(net), average=average)


def averages_in_the_optimizers_state() -> Way:
    net, optimizer = _base()
    averages = [torch.randn_like(parameter) for parameter in net.noisy()]
    for parameter, average in zip(net.noisy(), averages, strict=True):
        optimizer.state[parameter]["ema"] = average

    def write() -> None:
        torch._foreach_lerp_(averages, [parameter.detach() for parameter in net.noisy()], 0.5)

    return _way(net, optimizer, write, "ema")


def another_thread() -> Way:
    net, optimizer = _base()

    @torch.no_grad()
    def add() -> None:
        net.out.weight.add_(1)

    def write() -> None:
        thread = threading.Thread(target=add)
        thread.start()
        thread.join()

    return _way(net, optimizer, write, "out.weight")


def row_of_what_is_saved_through_data() -> Way:
    """The state has tensors with versions of their own, in which the write to the parameter does not show."""
    net, optimizer = _base(max_norm=1.0)

    def write() -> None:
        net.loss()

    state = {name: parameter.data for name, parameter in net.named_parameters()}
    return Way({"model": state, "opt": optimizer}, optimizer, write, ("emb.weight",))


WAYS: tuple[Callable[[], Way], ...] = (
    max_norm_in_forward,
    average_swapped_in_through_data,
    in_place_without_gradient,
    foreach_without_gradient,
    numpy_view,
    guarded_optimizer_stepped_in_backward,
    other_optimizers_stepped_in_backward,
    schedule_free,
    second_optimizer,
    spectral_norm_in_forward,
    averaged_model,
    averages_in_the_optimizers_state,
    another_thread,
    row_of_what_is_saved_through_data,
)


@dataclass
class Outcome:
    """What became of some saves.

    Attributes:
        failed: numbers of the saves that failed with ``TornSnapshotError``.
        messages: of these.
        wrong: numbers of those that were committed with other values than those at ``save()``.
    """

    saves: int = 0
    failed: list[int] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    wrong: list[int] = field(default_factory=list)


def run(way: Way, saves: int, directory: Path, faults: Faults) -> Outcome:
    """Save so many times, and compare what is committed."""
    outcome = Outcome(saves)
    with Checkpointer(directory, {"persistence": {"fsync": False}, "retention": {"keep_latest": 2}}) as ckpt:
        ckpt.guard(way.guarded)
        for number in range(saves):
            expected = _clone(way.state)
            handle = _save_and_write(ckpt, way, number, faults if number % 2 == 0 else None)
            try:
                handle.upload_completion.result()
            except TornSnapshotError as error:
                outcome.failed.append(number)
                outcome.messages.append(str(error))
            else:
                loaded = ckpt.load(number, allow_pickle=True)
                if loaded is None or not same(_clone(loaded.state), expected):
                    outcome.wrong.append(number)
            for group in way.guarded.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.randn_like(parameter)
            way.guarded.step()
    return outcome


def _save_and_write(ckpt: Checkpointer, way: Way, number: int, faults: Faults | None) -> Any:
    if faults is None:
        handle = ckpt.save(number, way.state)
        way.write()
        return handle
    with faults.hold("save.overlapped") as hold:
        handle = ckpt.save(number, way.state)
        hold.wait()
        if way.waits:
            thread = threading.Thread(target=way.write)
            thread.start()
            wait_until_blocked(thread, Saver.wait_for_staging)
            hold.release()
            thread.join()
        else:
            way.write()
            hold.release()
    hold.remove()
    return handle


def _clone(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if hasattr(value, "state_dict"):
        value = value.state_dict()
    if isinstance(value, dict):
        return {key: _clone(entry) for key, entry in value.items()}
    return [_clone(entry) for entry in value] if isinstance(value, list) else value


def _lines(saves: int, only: Sequence[str]) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as temporary:
        faults = faults_of_this_process(Path(temporary) / "faults")
        for make in WAYS:
            if not only or make.__name__ in only:
                outcome = run(make(), saves, Path(temporary) / make.__name__, faults)
                yield (
                    f"{make.__name__}: {outcome.saves} saves, refused {len(outcome.failed)} "
                    f"(numbers {outcome.failed[:5]}), torn and committed: {len(outcome.wrong)}"
                )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.states.writers", description=__doc__)
    parser.add_argument("--saves", type=int, default=100)
    parser.add_argument("--way", action="append", default=[], choices=[make.__name__ for make in WAYS])
    options = parser.parse_args(arguments)
    for line in _lines(options.saves, options.way):
        print(line, flush=True)


if __name__ == "__main__":
    main()
