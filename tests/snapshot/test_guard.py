"""What may be copied while training goes on, and the wait that makes it safe."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from stager import Checkpointer
from stager.snapshot.guard import Guard
from stager.snapshot.pieces import whole
from tests.faults import Faults
from tests.snapshot.staged import Bench
from tests.states import same


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.close()


class Net(torch.nn.Module):
    """Parameters, buffers that a forward pass changes, tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(6, 6)
        self.norm = torch.nn.BatchNorm1d(6)
        self.second = torch.nn.Linear(6, 6)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.norm(self.first(x)))


def _step(net: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = net(torch.randn(4, 6)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)


def _may_wait(bench: Bench, state: dict[str, Any]) -> set[str]:
    """Names of the tensors whose copies may wait."""
    snapshot = bench.begin(state)
    pieces = whole(snapshot.plan, snapshot.blobs, 2)
    _, later = bench.taker.split(snapshot, pieces, pieces.pieces[0])
    return {snapshot.tree.name(leaf) for copy in later.copies for leaf in copy.leaves}


def test_parameters_and_optimizer_state_wait_and_nothing_else_does(bench: Bench) -> None:
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters())
    ema = torch.optim.swa_utils.AveragedModel(net)
    _step(net, optimizer)
    bench.guard.add(optimizer)
    names = _may_wait(
        bench, {"model": net, "opt": optimizer, "ema": ema, "loose": torch.ones(3), "lr": torch.tensor(0.1)}
    )
    assert {n for n in names if n.startswith("model")} == {
        f"model[{name!r}]" for name, _ in net.named_parameters(remove_duplicate=False)
    }
    assert {n.rsplit("[", 1)[1] for n in names if n.startswith("opt")} == {"'exp_avg']", "'exp_avg_sq']", "'step']"}
    assert not {n for n in names if n.startswith(("ema", "loose", "lr"))}
    assert not {n for n in names if "running" in n or "num_batches" in n}


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, fused=True),
        lambda p: torch.optim.AdamW(p, foreach=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
        torch.optim.RMSprop,
    ],
)
def test_snapshot_holds_the_values_from_before_the_step_whatever_the_optimizer(
    run_dir: Path, faults: Faults, make: Callable[[Any], torch.optim.Optimizer]
) -> None:
    """1. the save is held before its guarded copies 2. a step begins in another thread and must wait 3. it goes on."""
    torch.manual_seed(0)
    net = Net()
    optimizer = make(net.parameters())
    _step(net, optimizer)
    state = {"model": net, "opt": optimizer}
    hold = faults.hold("save.overlapped")
    with Checkpointer(run_dir, {"staging": {"verify": True}}) as ckpt:
        ckpt.guard(optimizer)
        expected = _clone(state)
        handle = ckpt.save(1, state)
        hold.wait()
        net.norm.running_mean.fill_(77)  # not guarded: copied before save() returned
        stepping = threading.Thread(target=_step, args=(net, optimizer))
        stepping.start()  # its forward pass, in a closure, need not wait
        hold.release()
        stepping.join()
        handle.upload_completion.result()
        loaded = ckpt.load(1, allow_pickle=True)
    assert loaded is not None and same(loaded.state, expected)
    assert not same(_clone(state), expected)


def test_gradients_accumulate_while_the_copy_goes_on(run_dir: Path, faults: Faults) -> None:
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters())
    _step(net, optimizer)
    hold = faults.hold("save.overlapped")
    with Checkpointer(run_dir) as ckpt:
        ckpt.guard(optimizer)
        before = _clone({"model": net})["model"]
        handle = ckpt.save(1, {"model": net})
        hold.wait()
        for _ in range(3):
            net(torch.randn(4, 6)).sum().backward()  # neither waits nor touches what is guarded
        assert not handle.staging_completion.done()
        hold.release()
        optimizer.step()
        assert handle.staging_completion.done()
        handle.upload_completion.result()
        loaded = ckpt.load(1)
    assert loaded is not None and same(loaded.state["model"], before)


@pytest.mark.parametrize("how", ["positional", "keyword"])
def test_step_with_a_closure_waits_when_the_closure_has_run(how: str) -> None:
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    before = net.first.weight.detach().clone()
    order: list[str] = []

    def wait() -> None:
        order.append("wait")
        assert torch.equal(net.first.weight, before)

    def closure() -> float:
        order.append("closure")
        net(torch.randn(4, 6)).sum().backward()
        return 7.0

    guard = Guard(wait)
    guard.add(optimizer)
    returned = optimizer.step(closure) if how == "positional" else optimizer.step(closure=closure)
    assert order == ["closure", "wait"] and returned == 7.0
    assert not torch.equal(net.first.weight, before)
    guard.close()


def test_step_that_writes_before_its_closure_waits_at_once() -> None:
    parameter = torch.nn.Parameter(torch.ones(4))
    parameter.grad = torch.ones(4)
    optimizer = Sharpness(torch.optim.SGD([parameter], lr=0.1))
    seen: list[float] = []
    guard = Guard(lambda: seen.append(parameter[0].item()))
    guard.add(optimizer)
    optimizer.step(lambda: None)
    assert seen[0] == 1.0
    guard.close()


def test_each_of_several_optimizers_waits(run_dir: Path, faults: Faults) -> None:
    nets = [torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)]
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in nets]
    for net in nets:
        net(torch.randn(2, 4)).sum().backward()
    hold = faults.hold("save.overlapped")
    with Checkpointer(run_dir) as ckpt:
        ckpt.guard(*optimizers)
        ckpt.guard(optimizers[0])  # again is the same as once
        expected = _clone({"a": nets[0], "b": nets[1]})
        handle = ckpt.save(1, {"a": nets[0], "b": nets[1]})
        hold.wait()
        threads = [threading.Thread(target=optimizer.step) for optimizer in optimizers]
        for thread in threads:
            thread.start()
        hold.release()
        for thread in threads:
            thread.join()
        handle.upload_completion.result()
        loaded = ckpt.load(1)
    assert loaded is not None and same(loaded.state, expected)


def test_memory_beyond_what_the_optimizer_owns_does_not_wait(bench: Bench) -> None:
    flat = torch.zeros(100)
    parameter = torch.nn.Parameter(flat[:10])
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    bench.guard.add(optimizer)
    assert _may_wait(bench, {"p": parameter}) == {"p"}
    assert _may_wait(bench, {"flat": flat}) == set()  # begins where the parameter does, and goes on
    assert _may_wait(bench, {"p": parameter, "flat": flat}) == set()  # one stretch of memory, copied at once
    assert _may_wait(bench, {"every other": parameter.detach()[::2]}) == set()  # packed: it has no samples
    assert _may_wait(bench, {"later part": flat[5:10]}) == set()


def test_optimizer_whose_state_grew_is_seen_by_the_next_save(bench: Bench) -> None:
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters())
    bench.guard.add(optimizer)
    assert not {n for n in _may_wait(bench, {"opt": optimizer}) if "exp_avg" in n}
    _step(net, optimizer)
    assert {n for n in _may_wait(bench, {"opt": optimizer}) if "exp_avg" in n}
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
    assert _may_wait(bench, {"new": optimizer.param_groups[1]["params"][0]}) == {"new"}


def test_optimizer_that_has_another_tensor_now_guards_the_one_before_no_longer(bench: Bench) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    moment = optimizer.state[parameter]["momentum"] = torch.ones(3)
    bench.guard.add(optimizer)
    state = {"w": parameter.detach(), "moment": moment, "tied": moment.view(3, 1)}
    assert _may_wait(bench, state) == {"w", "moment", "tied"}
    optimizer.state[parameter]["momentum"] = moment.clone()
    assert _may_wait(bench, state) == {"w"}
    optimizer.state[parameter]["momentum"] = moment
    assert _may_wait(bench, state) == {"w", "moment", "tied"}
    optimizer.param_groups[0]["params"] = []
    assert _may_wait(bench, state) == {"moment", "tied"}


def test_gaps_of_a_guarded_tensor_that_is_saved_do_not_wait(bench: Bench) -> None:
    base = torch.ones(6, 2)
    parameter = torch.nn.Parameter(base[::2], requires_grad=False)
    bench.guard.add(torch.optim.SGD([parameter], lr=0.1))
    assert _may_wait(bench, {"w": parameter, "base": base, "row": base[0]}) == set()


def test_dropped_optimizer_guards_nothing(bench: Bench) -> None:
    parameter = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    bench.guard.add(optimizer)
    assert _may_wait(bench, {"p": parameter}) == {"p"}
    del optimizer
    assert _may_wait(bench, {"p": parameter}) == set()


def test_only_optimizers_can_be_guarded() -> None:
    with pytest.raises(TypeError, match=r"takes torch optimizers, .* got a Linear"):
        Guard(lambda: None).add(torch.nn.Linear(1, 1))


class Accelerated(torch.optim.Optimizer):
    """As Accelerate's wrapper: a torch optimizer by class only, whose base was never initialised."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: Any) -> None:
        self.optimizer.param_groups = groups

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)


class MixedPrecision:
    """As Apex's and DeepSpeed's: no torch optimizer."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups

    def step(self) -> None:
        self.optimizer.step()


class Chained:
    """As Megatron's: several optimizers in one."""

    def __init__(self, *optimizers: Any) -> None:
        self.chained_optimizers = list(optimizers)
        self.param_groups = [group for one in optimizers for group in one.param_groups]

    def step(self) -> None:
        for optimizer in self.chained_optimizers:
            optimizer.step()


class Sharpness(torch.optim.Optimizer):
    """As SAM: writes to the parameters itself, before the optimizer that it wraps does."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        super().__init__(base.param_groups, {})
        self.base_optimizer = base

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(1)
        self.base_optimizer.step()


@pytest.mark.parametrize(
    "wrap",
    [
        Accelerated,
        MixedPrecision,
        Chained,
        Sharpness,
        lambda optimizer: MixedPrecision(MixedPrecision(Accelerated(optimizer))),
        lambda optimizer: Chained(MixedPrecision(optimizer)),
    ],
)
def test_wrapped_optimizer_is_guarded_and_its_step_waits_before_it_writes(
    bench: Bench, wrap: Callable[[torch.optim.Optimizer], Any]
) -> None:
    parameter = torch.nn.Parameter(torch.ones(4))
    parameter.grad = torch.ones(4)
    seen: list[float] = []
    guard = Guard(lambda: seen.append(parameter[0].item()))
    wrapper = wrap(torch.optim.SGD([parameter], lr=0.1))
    guard.add(wrapper)
    guard.add(wrapper)  # again is the same as once
    wrapper.step()
    assert seen[0] == 1.0 and len(seen) == (2 if isinstance(wrapper, Sharpness) else 1)
    bench.guard.add(wrapper)
    assert _may_wait(bench, {"p": parameter}) == {"p"}
    guard.close()


def test_accelerates_own_optimizer_is_seen_through(bench: Bench) -> None:
    pytest.importorskip("accelerate")  # pip install --no-deps accelerate
    from accelerate import Accelerator

    parameter = torch.nn.Parameter(torch.ones(4))
    parameter.grad = torch.ones(4)
    wrapper = Accelerator(cpu=True).prepare(torch.optim.SGD([parameter], lr=0.1))
    seen: list[float] = []
    guard = Guard(lambda: seen.append(parameter[0].item()))
    guard.add(wrapper)
    wrapper.step()
    assert seen == [1.0] and parameter[0].item() != 1.0
    bench.guard.add(wrapper)
    assert _may_wait(bench, {"p": parameter}) == {"p"}
    guard.close()


def _clone(state: dict[str, Any]) -> dict[str, Any]:
    def clone(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.detach().clone()
        if isinstance(value, dict):
            return {key: clone(entry) for key, entry in value.items()}
        return [clone(entry) for entry in value] if isinstance(value, list) else value

    return {name: clone(value.state_dict()) for name, value in state.items()}
