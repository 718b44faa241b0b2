"""What only a GPU can show. ``tests/house/test_gpu_on_cpu.py`` runs these tests on the CPU, too."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch

from stager.torch_api.staging import DefaultStager, StagingOptions
from stager.torch_api.staging.state_dict_stager import StateDictStager

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def device() -> str:
    return "cuda"


def slow_state(device: str) -> dict[str, Any]:
    """Values that a queue of kernels is still computing when this returns."""
    width = 2048 if device == "cuda" else 16
    x = torch.ones(width, width, device=device) / width
    for _ in range(200):
        x = x @ x
        x = x / x.sum() * width
    return {"w": x, "view": x[3:9], "conj": torch.ones(4, dtype=torch.complex64, device=device).mul_(1j).conj()}


def stager_for(device: str) -> DefaultStager:
    """With the options that only an accelerator can have, where there is one."""
    return DefaultStager(StagingOptions() if device == "cuda" else StagingOptions(False, True, True, False))


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def on_a_stream_of_its_own(device: str) -> AbstractContextManager[Any]:
    """Of the trainer's. The CPU has none."""
    return torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else nullcontext()


@pytest.mark.parametrize("share_memory", [False, True])
@pytest.mark.parametrize("pin_memory", [False, True])
def test_pinned_and_shared(pin_memory: bool, share_memory: bool, device: str) -> None:
    source = {"w": torch.randn(64, 64, device=device), "big": torch.randn(1 << 20, device=device)}
    staged = StateDictStager(pin_memory, share_memory).stage(source)
    synchronize(device)
    for key, tensor in staged.items():
        assert torch.equal(tensor, source[key].cpu())
        assert (tensor.is_pinned(), tensor.is_shared()) == (pin_memory and device == "cuda", share_memory)


def test_async_staging_waits_for_the_trainers_kernels(device: str) -> None:
    with stager_for(device) as stager:
        with on_a_stream_of_its_own(device):
            source = slow_state(device)
            staged = stager.stage(source).result()
        synchronize(device)
        for key, tensor in source.items():
            assert torch.equal(staged[key], tensor.cpu())


def test_a_failed_registration_leaves_no_error_behind(device: str) -> None:
    from stager.workers.memory import pinning

    storage = torch.UntypedStorage(4096)
    with pytest.warns(RuntimeWarning):
        assert not pinning.pin(storage, 8, 1 << 60)
    assert torch.ones(3, device=device).sum().item() == 3


def test_sources_freed_by_the_trainer_are_still_copied_whole(device: str) -> None:
    with stager_for(device) as stager:
        values = slow_state(device)["w"]
        expected = values.clone()
        future = stager.stage({"w": values})
        del values
        torch.full_like(expected, 7.0)  # would take the freed memory
        assert torch.equal(future.result()["w"], expected.cpu())
