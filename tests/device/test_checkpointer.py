"""Snapshots of tensors on devices: what was in the trainer's stream before ``save()`` is in, what comes later is not."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from stager import Checkpointer
from tests.observed import slab_ranges, workers_of
from tests.states import same

pytestmark = pytest.mark.usefixtures("reached")


def on_host(state: Any) -> Any:
    """The same state in host memory. It waits for the streams, so it is read when the save is over."""
    if isinstance(state, torch.Tensor):
        return state.cpu()
    if isinstance(state, dict):
        return {key: on_host(value) for key, value in state.items()}
    return state


def saved(ckpt: Checkpointer, step: int) -> Any:
    loaded = ckpt.load(step)
    assert loaded is not None
    return loaded.state


def test_kernels_queued_before_save_are_in_the_snapshot_and_later_ones_are_not(
    run_dir: Path, device: torch.device
) -> None:
    tensor = torch.zeros(1000, device=device)
    small = [torch.zeros(7, device=device) for _ in range(20)]
    with Checkpointer(run_dir) as ckpt:
        for step in range(4):
            for _ in range(5):
                torch._foreach_add_([tensor, *small], 1)
            handle = ckpt.save(step, {"x": tensor, "small": small})
            for _ in range(5):
                torch._foreach_add_([tensor, *small], 1)
            handle.upload_completion.result()
            state = saved(ckpt, step)
            assert torch.all(state["x"] == 10 * step + 5)
            assert all(torch.all(one == 10 * step + 5) for one in state["small"])


def test_the_stream_and_the_device_that_are_current_are_the_trainers(run_dir: Path, other_device: torch.device) -> None:
    stream = torch.Stream(device=other_device)
    with Checkpointer(run_dir) as ckpt:
        torch.accelerator.set_stream(stream)
        torch.accelerator.set_device_index(other_device.index)
        try:
            tensor = torch.zeros(1000, device=other_device)
            tensor.add_(1)
            handle = ckpt.save(0, {"x": tensor})
            assert torch.accelerator.current_stream(other_device) == stream
            assert torch.accelerator.current_device_index() == other_device.index
            tensor.add_(1)
            handle.upload_completion.result()
        finally:
            stream.synchronize()
            torch.accelerator.set_device_index(0)
        assert torch.all(saved(ckpt, 0)["x"] == 1)


def test_save_in_a_thread_has_that_threads_streams(run_dir: Path, device: torch.device) -> None:
    with Checkpointer(run_dir) as ckpt:

        def train() -> None:
            stream = torch.Stream(device=device)
            torch.accelerator.set_stream(stream)
            tensor = torch.zeros(1000, device=device)
            tensor.add_(5)
            handle = ckpt.save(0, {"x": tensor})
            tensor.zero_()
            handle.upload_completion.result()
            stream.synchronize()

        thread = threading.Thread(target=train)
        thread.start()
        thread.join()
        assert torch.all(saved(ckpt, 0)["x"] == 5)


def test_two_devices_and_the_host_in_one_state(run_dir: Path, device: torch.device, other_device: torch.device) -> None:
    state = {
        "first": torch.arange(5000.0, device=device),
        "second": torch.arange(3000, device=other_device),
        "host": torch.randn(100),
        "small": [torch.full((3,), n, device=(device, other_device)[n % 2]) for n in range(30)],
    }
    expected = on_host(state)
    with Checkpointer(run_dir) as ckpt:
        handle = ckpt.save(0, state)
        state["first"].zero_()
        state["second"].zero_()
        handle.upload_completion.result()
        found = saved(ckpt, 0)
    assert same(
        {k: found[k] for k in ("first", "second", "host")}, {k: expected[k] for k in ("first", "second", "host")}
    )
    assert [int(one[0]) for one in found["small"]] == list(range(30))


def _state_of_all_kinds(device: torch.device) -> dict[str, Any]:
    base = torch.randn(64, 32, device=device)
    return {
        "a": base,
        "b": base.t(),
        "c": base[3:9],
        "d": base[:, 5],
        "e": torch.complex(base, base).conj(),
        "f": torch.zeros(0, 3, device=device),
        "g": torch.tensor(3, device=device),
        "h": torch.randint(0, 2, (17,), device=device).bool(),
        "i": torch.randn(5, device=device).to(torch.bfloat16),
        "large": torch.randn(1 << 19, device=device),
    }


@pytest.mark.parametrize("verify", [False, True])
def test_tied_viewed_strided_and_conjugate_tensors_round_trip(
    run_dir: Path, device: torch.device, verify: bool
) -> None:
    state = _state_of_all_kinds(device)
    with Checkpointer(run_dir, {"staging": {"verify": verify}}) as ckpt:
        ckpt.save(0, state).upload_completion.result()
        assert same(saved(ckpt, 0), on_host(state))
        into = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        ckpt.load(into=into)
    assert same(on_host(into), on_host(state))


def test_state_in_pieces(run_dir: Path, device: torch.device) -> None:
    state = {f"w{n}": torch.full((1 << 18,), float(n), device=device) for n in range(12)}
    config = {"arena": {"max_host_bytes": "4MiB", "buffers": 2}, "persistence": {"segment_bytes": "1MiB"}}
    with Checkpointer(run_dir, config) as ckpt:
        handle = ckpt.save(0, state)
        for tensor in state.values():
            tensor.fill_(-1.0)
        handle.upload_completion.result()
        assert [float(saved(ckpt, 0)[f"w{n}"].mean()) for n in range(12)] == list(range(12))


def test_what_has_not_changed_is_linked(run_dir: Path, device: torch.device) -> None:
    state = {"frozen": torch.randn(1 << 18, device=device), "moves": torch.zeros(10, device=device)}
    with Checkpointer(run_dir, {"persistence": {"incremental": True}}) as ckpt:
        for step in range(3):
            state["moves"].add_(1)
            handle = ckpt.save(step, state)
            handle.upload_completion.result()
        assert same(saved(ckpt, 2), on_host(state))


def test_saves_in_inference_mode(run_dir: Path, device: torch.device) -> None:
    with Checkpointer(run_dir) as ckpt, torch.inference_mode():
        state = {"x": torch.ones(100, device=device) * 3}
        handle = ckpt.save(0, state)
        state["x"].zero_()
        handle.upload_completion.result()
        assert torch.all(saved(ckpt, 0)["x"] == 3)


def _training(
    device: torch.device, **options: Any
) -> tuple[torch.nn.Module, torch.optim.Optimizer, Callable[[], None]]:
    model = torch.nn.Sequential(torch.nn.Linear(16, 300), torch.nn.Linear(300, 4)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, **options)

    def step() -> None:
        optimizer.zero_grad()
        model(torch.randn(8, 16, device=device)).sum().backward()
        optimizer.step()

    return model, optimizer, step


def test_what_is_dropped_after_save_is_whole_in_the_snapshot(run_dir: Path, device: torch.device) -> None:
    model, optimizer, step = _training(device)
    step()
    expected = {k: v.clone() for k, v in model.state_dict().items()}
    with Checkpointer(run_dir) as ckpt:
        ckpt.guard(optimizer)
        handle = ckpt.save(0, {"model": model, "optimizer": optimizer})
        del model, optimizer, step
        taken = [torch.full_like(value, 7.0) for value in expected.values()]  # would take the freed memory
        handle.upload_completion.result()
        assert same(dict(saved(ckpt, 0)["model"]), on_host(expected))
        assert taken


def test_load_fills_tensors_on_their_device(run_dir: Path, device: torch.device) -> None:
    model, optimizer, step = _training(device)
    step()
    state = {"model": model, "optimizer": optimizer, "x": torch.arange(1000, device=device)}
    with Checkpointer(run_dir) as ckpt:
        ckpt.save(0, state).upload_completion.result()
        expected = {k: v.clone() for k, v in model.state_dict().items()}
        for _ in range(2):
            step()
        state["x"].zero_()
        address = state["x"].data_ptr()
        ckpt.load(into=state)
        assert state["x"].data_ptr() == address and state["x"].device == device
    assert same(on_host(dict(model.state_dict())), on_host(expected))
    assert torch.equal(state["x"].cpu(), torch.arange(1000))


@pytest.mark.usefixtures("fresh_workers")  # which have not imported torch, and so map none of its libraries
def test_buffers_are_reached_as_the_backend_can_and_workers_have_no_context(
    run_dir: Path, device: torch.device, reached: str
) -> None:
    state = {"x": torch.randn(1 << 20, device=device)}
    with Checkpointer(run_dir) as ckpt:
        ckpt.warmup(state)
        ckpt.save(0, state).upload_completion.result()
        ranges = list(slab_ranges())
        assert sum(end - begin for begin, end in ranges) >= 2 * state["x"].nbytes
        for begin, _ in ranges:
            first = torch.frombuffer((ctypes.c_char * 16).from_address(begin), dtype=torch.uint8)
            assert first.is_pinned() is (reached == "registered")
        for pid in workers_of(os.getpid()):
            maps = psutil.Process(pid).memory_maps()
            assert not any("nvidia" in mapping.path or "simulated" in mapping.path for mapping in maps)
