"""What trains on a device: optimizers of every kind, and graphs that capture a step."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stager import Checkpointer
from stager.workers.device import accelerator, streams
from stager.workers.errors import UsageError
from tests.device.test_checkpointer import on_host, saved
from tests.states import same

pytestmark = pytest.mark.usefixtures("reached")

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "for each": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=False),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "capturable": lambda p: torch.optim.AdamW(p, lr=0.1, capturable=True),
    "capturable, foreach": lambda p: torch.optim.AdamW(p, lr=0.1, capturable=True, foreach=True),
    "fused SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "lr on the device": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.1, device=p[0].device), capturable=True),
}


def _model(device: torch.device) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(16, 300), torch.nn.Linear(300, 4)).to(device)


def _backward(model: torch.nn.Module, device: torch.device) -> None:
    for parameter in model.parameters():
        parameter.grad = None
    model(torch.randn(8, 16, device=device)).sum().backward()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_guarded_training_saves_the_values_from_before_the_step(run_dir: Path, device: torch.device, kind: str) -> None:
    model = _model(device)
    optimizer = OPTIMIZERS[kind](list(model.parameters()))
    with Checkpointer(run_dir) as ckpt:
        ckpt.guard(optimizer)
        for number in range(3):
            _backward(model, device)
            optimizer.step()
            weights = {k: v.clone() for k, v in model.state_dict().items()}
            moments = [{k: v.clone() for k, v in s.items() if v is not None} for s in optimizer.state.values()]
            handle = ckpt.save(number, {"model": model, "optimizer": optimizer})
            _backward(model, device)
            optimizer.step()
            handle.upload_completion.result()
            state = saved(ckpt, number)
            assert same(dict(state["model"]), on_host(weights))
            for moment, found in zip(moments, state["optimizer"]["state"].values(), strict=True):
                assert all(torch.equal(value.cpu(), found[key]) for key, value in moment.items())


@pytest.mark.filterwarnings("ignore")  # of the compiler's own
def test_a_compiled_step_waits_for_the_snapshot(run_dir: Path, device: torch.device) -> None:
    model = _model(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = torch.compile(optimizer.step, backend="eager")
    with Checkpointer(run_dir) as ckpt:
        ckpt.guard(optimizer)
        for number in range(3):
            _backward(model, device)
            weights = {k: v.clone() for k, v in model.state_dict().items()}
            handle = ckpt.save(number, {"model": model})
            step()
            assert handle.staging_completion.done()
            handle.upload_completion.result()
            assert same(dict(saved(ckpt, number)["model"]), on_host(weights))


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Let the current stream say that it records a graph."""
    from stager.snapshot import guard

    def set_capturing(value: bool) -> None:
        for module in (accelerator, streams, guard):
            monkeypatch.setattr(module, "is_capturing", lambda: value)

    return set_capturing


def test_no_save_or_load_while_a_graph_is_captured(
    run_dir: Path, device: torch.device, capturing: Callable[[bool], None]
) -> None:
    state = {"x": torch.ones(5, device=device)}
    with Checkpointer(run_dir) as ckpt:
        ckpt.save(0, state).upload_completion.result()
        capturing(True)
        with pytest.raises(UsageError, match="recording a graph"):
            ckpt.save(1, state)
        with pytest.raises(UsageError, match="recording a graph"):
            ckpt.load(into=state)
        capturing(False)
        ckpt.save(2, state).upload_completion.result()
        assert [info.step for info in ckpt.checkpoints()] == [0, 2]


def test_an_optimizer_whose_step_is_captured_is_not_guarded_any_more(
    run_dir: Path, device: torch.device, capturing: Callable[[bool], None], caplog: pytest.LogCaptureFixture
) -> None:
    model = _model(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _backward(model, device)
    with Checkpointer(run_dir) as ckpt:
        ckpt.guard(optimizer)
        optimizer.step()
        capturing(True)
        with caplog.at_level(logging.WARNING, "stager"):
            optimizer.step()
        capturing(False)
        assert "replays of the graph run no hooks" in caplog.text
        weights = {k: v.clone() for k, v in model.state_dict().items()}
        handle = ckpt.save(0, {"model": model})
        assert handle.staging_completion.done()  # nothing is left to be copied behind the trainer's back
        for parameter in model.parameters():
            parameter.data.zero_()  # as a replay does: no hook, no version
        handle.upload_completion.result()
        assert same(dict(saved(ckpt, 0)["model"]), on_host(weights))
