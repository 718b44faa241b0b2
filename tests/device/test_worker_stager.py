"""``WorkerStager`` on tensors of devices: the trainer copies them into the result, behind its kernels; workers see none."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stager import WorkerStager
from tests.device.test_stagers import slow_state

CONFIG = {"workers": {"count": 1, "nice": 0}, "staging": {"copy_threads": 1}}


@pytest.mark.filterwarnings("ignore:could not pin")
def test_copies_wait_for_the_trainers_kernels(device: torch.device, reached: str) -> None:
    stream = torch.Stream(device=device)
    before = torch.accelerator.current_stream(device)
    with WorkerStager(CONFIG) as stager:
        torch.accelerator.set_stream(stream)
        try:
            source = {**slow_state(device), "small": [torch.full((3,), float(i), device=device) for i in range(50)]}
            expected = {key: value.clone() for key, value in source.items() if isinstance(value, torch.Tensor)}
            staged = stager.stage(source).result()
            source["w"].zero_()
        finally:
            torch.accelerator.set_stream(before)
        stream.synchronize()
        for key, tensor in expected.items():
            assert torch.equal(staged[key], tensor.cpu())
        assert staged["w"].is_pinned() is (reached == "registered")
        assert [tensor.tolist() for tensor in staged["small"]] == [[i] * 3 for i in range(50)]
        assert staged["view"].untyped_storage() is staged["w"].untyped_storage()


@pytest.mark.filterwarnings("ignore:could not pin")
def test_tensors_of_two_devices_and_of_the_host(device: torch.device, other_device: torch.device) -> None:
    source: dict[str, Any] = {
        "one": torch.arange(1 << 19, device=device),
        "other": torch.arange(1 << 19, device=other_device).neg(),
        "host": torch.arange(1 << 19),
        "parameter": torch.nn.Parameter(torch.ones(5, device=device)),
    }
    with WorkerStager(CONFIG) as stager:
        for _ in range(2):
            staged = stager.stage(source).result()
            for key, tensor in source.items():
                assert torch.equal(staged[key], tensor.cpu())
                assert (staged[key].device.type, staged[key].is_shared()) == ("cpu", True)
                assert type(staged[key]) is type(tensor)


@pytest.mark.filterwarnings("ignore:could not pin")
def test_source_may_be_freed_before_the_copy_is_made(device: torch.device) -> None:
    with WorkerStager(CONFIG) as stager:
        values = slow_state(device)["w"]
        expected = values.clone()
        future = stager.stage({"w": values})
        del values
        torch.full_like(expected, 7.0)  # would take the freed memory
        assert torch.equal(future.result()["w"], expected.cpu())
