"""``staging.location`` as users see it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stager import Checkpointer
from tests.faults import Faults
from tests.states import same

LARGE = 1 << 19  # elements: 2 MiB of float32


@pytest.mark.parametrize("location", ["auto", "trainer"])
def test_memory_of_the_user_is_moved_only_if_they_ask_for_it(run_dir: Path, location: str) -> None:
    state = {"x": torch.randn(LARGE)}
    address = state["x"].data_ptr()
    with Checkpointer(run_dir, {"staging": {"location": location}}) as ckpt:
        ckpt.save(0, state).upload_completion.result()
    assert state["x"].data_ptr() == address and not state["x"].is_shared()


@pytest.mark.parametrize("guarded", [False, True])
def test_workers_copy_large_tensors_and_the_trainer_the_rest(run_dir: Path, guarded: bool) -> None:
    net = torch.nn.Linear(1024, 1024)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net(torch.randn(2, 1024)).sum().backward()
    optimizer.step()
    state: dict[str, Any] = {"net": net, "opt": optimizer, "numpy": torch.from_numpy(np.ones(LARGE, np.float32))}
    config = {"staging": {"location": "workers", "verify": True}}
    with Checkpointer(run_dir, config) as ckpt:
        if guarded:
            ckpt.guard(optimizer)
        ckpt.warmup(state)
        assert net.weight.is_shared() and not state["numpy"].is_shared()
        for step in range(3):
            expected = {
                "net": _copy(net.state_dict()),
                "opt": _copy(optimizer.state_dict()),
                "numpy": state["numpy"].clone(),
            }
            handle = ckpt.save(step, state)
            optimizer.step()
            handle.upload_completion.result()
            loaded = ckpt.load(step)
            assert loaded is not None and same(loaded.state, expected)
    copied_by = {event.process for event in handle.report.timings if event.name == "stage"}
    assert any(process.startswith("worker") for process in copied_by) and "trainer" in copied_by
    assert any("copied by the trainer" in note and "numpy" in note for note in handle.report.notes)


def test_worker_killed_while_it_copies_is_replaced_and_the_snapshot_is_whole(run_dir: Path, faults: Faults) -> None:
    state = {str(i): torch.randn(LARGE) for i in range(4)}
    with Checkpointer(run_dir, {"staging": {"location": "workers", "verify": True}}) as ckpt:
        ckpt.warmup(state)
        faults.arm("copy.piece", "kill after=1")
        ckpt.save(0, state).upload_completion.result()
        assert faults.fired("copy.piece")
        loaded = ckpt.load(0)
    assert loaded is not None and same(loaded.state, state)


def test_tensor_that_was_replaced_is_not_read_from_where_it_was(run_dir: Path) -> None:
    state = {"x": torch.randn(LARGE), "y": torch.randn(LARGE)}
    with Checkpointer(run_dir, {"staging": {"location": "workers", "verify": True}}) as ckpt:
        for step in range(4):
            state["x"] = torch.full((LARGE,), float(step))  # the memory of the one before is free for it
            ckpt.save(step, state).upload_completion.result()
            loaded = ckpt.load(step)
            assert loaded is not None and same(loaded.state, state)


def _copy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copy(entry) for key, entry in value.items()}
    return [_copy(entry) for entry in value] if isinstance(value, list) else value
