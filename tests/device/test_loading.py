"""Loading into tensors of a device: through page-locked buffers, while more is read, behind what the trainer has queued."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stager import Checkpointer
from stager.loading.reading import device_fill
from stager.workers.errors import CorruptCheckpointError
from tests.device.conftest import SIMULATED
from tests.device.test_checkpointer import on_host
from tests.states import same


def _state(device: torch.device) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    dtypes = [torch.float32, torch.bfloat16, torch.uint8, torch.complex64, torch.int64, torch.bool]
    lengths = torch.randint(0, 300, (400,), generator=generator).tolist()
    return {
        "large": torch.randn(1 << 21, device=device),
        "larger": torch.arange(900_001, device=device),
        "medium": [torch.randn(40_000 + n, device=device) for n in range(5)],
        "small": [
            torch.randint(0, 2, (n,), generator=generator).to(dtypes[i % 6]).to(device) for i, n in enumerate(lengths)
        ],
        "strided": torch.randn(300, 200, device=device).t(),
        "column": torch.randn(30, 20, device=device)[:, 3],
        "conj": torch.ones(7, dtype=torch.complex64, device=device).mul_(1j).conj(),
        "host": torch.randn(100),
    }


def _zeros_like(state: Any) -> Any:
    if isinstance(state, torch.Tensor):
        return torch.zeros_like(state)
    if isinstance(state, list):
        return [_zeros_like(value) for value in state]
    return {key: _zeros_like(value) for key, value in state.items()}


def _flat(state: dict[str, Any]) -> dict[str, Any]:
    flat = {key: value for key, value in state.items() if not isinstance(value, list)}
    for key in state.keys() - flat.keys():
        flat |= {f"{key}.{number}": value for number, value in enumerate(state[key])}
    return flat


@pytest.mark.parametrize("batch_bytes", [32 << 20, 100_000])
def test_tensors_of_every_size_come_back_exact(
    run_dir: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch, batch_bytes: int
) -> None:
    monkeypatch.setattr(device_fill, "_BATCH_BYTES", batch_bytes)
    state = _state(device)
    into = _zeros_like(state)
    versions = {key: tensor._version for key, tensor in _flat(into).items()}
    with Checkpointer(run_dir) as ckpt:
        ckpt.save(0, state).upload_completion.result()
        ckpt.load(into=into)
    torch.accelerator.synchronize()
    assert same(on_host(_flat(into)), on_host(_flat(state)))
    assert all(tensor._version > versions[key] for key, tensor in _flat(into).items())


def test_kernels_queued_before_load_see_the_old_values_and_later_ones_the_new(
    run_dir: Path, device: torch.device
) -> None:
    state = {"large": torch.ones(1 << 20, device=device), "small": torch.ones(5, device=device)}
    with Checkpointer(run_dir) as ckpt:
        ckpt.save(0, state).upload_completion.result()
        for tensor in state.values():
            tensor.fill_(2)
        before = {key: tensor * 10 for key, tensor in state.items()}
        ckpt.load(into=state)
        after = {key: tensor * 10 for key, tensor in state.items()}
    for key in state:
        assert torch.all(before[key] == 20)
        assert torch.all(after[key] == 10)


def test_all_is_there_when_load_returns_for_a_stream_that_waits_for_no_other(
    run_dir: Path, device: torch.device
) -> None:
    state = {"large": torch.ones(1 << 20, device=device), "small": [torch.ones(5, device=device) for _ in range(3)]}
    trainers = torch.accelerator.current_stream(device)
    with Checkpointer(run_dir) as ckpt:
        ckpt.save(0, state).upload_completion.result()
        for tensor in (state["large"], *state["small"]):
            tensor.zero_()
        ckpt.load(into=state)
        torch.accelerator.set_stream(torch.Stream(device=device))
        try:
            found = [tensor.cpu() for tensor in (state["large"], *state["small"])]
        finally:
            torch.accelerator.set_stream(trainers)
    assert all(torch.all(tensor == 1) for tensor in found)


def test_two_devices_a_stream_that_is_not_the_default_and_one_value_for_two_tensors(
    run_dir: Path, device: torch.device, other_device: torch.device
) -> None:
    tied = torch.randn(1 << 20, device=device)
    state = {"a": tied, "b": tied, "c": torch.randn(1 << 20, device=other_device), "d": torch.randn(3, device=device)}
    expected = on_host(state)
    into = {key: torch.zeros_like(tensor) for key, tensor in state.items()}  # a and b are no longer tied
    stream = torch.Stream(device=other_device)
    with Checkpointer(run_dir) as ckpt:
        ckpt.save(0, state).upload_completion.result()
        torch.accelerator.set_stream(stream)
        try:
            into["c"].add_(1)
            ckpt.load(into=into)
            assert torch.accelerator.current_stream(other_device) == stream
            assert torch.equal(into["c"].cpu(), expected["c"])
        finally:
            stream.synchronize()
            torch.accelerator.set_device_index(0)
    assert all(torch.equal(into[key].cpu(), expected[key]) for key in into)


def test_damage_is_found_and_says_that_the_target_is_partly_overwritten(run_dir: Path, device: torch.device) -> None:
    state = {"large": torch.ones(1 << 21, device=device)}
    with Checkpointer(run_dir) as ckpt:
        info = ckpt.save(0, state).upload_completion.result()
        (file,) = Path(info.path).glob("*.distcp")
        data = bytearray(file.read_bytes())
        data[-len(data) // 3] ^= 1
        file.write_bytes(data)
        with pytest.raises(CorruptCheckpointError, match="partly overwritten"):
            ckpt.load(0, into=state)


@pytest.mark.skipif(not SIMULATED, reason="only the simulated accelerator counts")
def test_many_small_tensors_take_one_transfer_and_hold_up_nothing(run_dir: Path, device: torch.device) -> None:
    from tests.accelerator import device as simulated

    state = {f"w{n}": torch.full((n % 100 + 1,), float(n), device=device) for n in range(1000)}
    with Checkpointer(run_dir) as ckpt:
        ckpt.save(0, state).upload_completion.result()
        torch.accelerator.synchronize()
        simulated.reset_counters()
        ckpt.load(into=state)
    counted = simulated.counters()
    assert counted["copies_to_device"] == 1
    assert counted["kernels"] <= 2  # one multi-tensor copy for each width of elements
    assert counted["waits"] == counted["synchronizations"] == 1
    assert counted["blocking_copies"] == counted["waits_of_default"] == 0
