"""Torch's stagers on tensors of a device: copies wait for the trainer's kernels, and are whole when they say so."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stager.torch_api.staging import BlockingAsyncStager, DefaultStager, StagingOptions
from stager.torch_api.staging.state_dict_stager import StateDictStager
from stager.workers.device import host_memory


def slow_state(device: torch.device) -> dict[str, Any]:
    """Values that a queue of kernels is still computing when this returns."""
    width = 2048 if device.type == "cuda" else 16
    x = torch.ones(width, width, device=device) / width
    for _ in range(200 if device.type == "cuda" else 20):
        x = x @ x
        x = x / x.sum() * width
    return {"w": x, "view": x[3:9], "conj": torch.ones(4, dtype=torch.complex64, device=device).mul_(1j).conj()}


@pytest.mark.parametrize("share_memory", [False, True])
@pytest.mark.parametrize("pin_memory", [False, True])
def test_pinned_and_shared(pin_memory: bool, share_memory: bool, device: torch.device, reached: str) -> None:
    source = {"w": torch.randn(64, 64, device=device), "big": torch.randn(1 << 20, device=device)}
    unpinned = pin_memory and share_memory and reached == "bounced"
    if unpinned:  # this backend cannot register shared memory, and says so
        with pytest.warns(RuntimeWarning, match="could not pin"):
            staged = StateDictStager(pin_memory, share_memory).stage(source)
    else:
        staged = StateDictStager(pin_memory, share_memory).stage(source)
    torch.accelerator.synchronize()
    for key, tensor in staged.items():
        assert torch.equal(tensor, source[key].cpu())
        assert (tensor.is_pinned(), tensor.is_shared()) == (pin_memory and not unpinned, share_memory)


@pytest.fixture(autouse=True)
def warns_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """The warning is given once in a process."""
    monkeypatch.setattr(host_memory._state, "warned", False)


OPTIONS = [
    StagingOptions(pinned, shared, in_a_thread, non_blocking)
    for pinned, shared in ((True, False), (False, True), (False, False))
    for in_a_thread in (True, False)
    for non_blocking in (True, False)
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_staging_waits_for_the_trainers_kernels(options: StagingOptions, device: torch.device) -> None:
    stream = torch.Stream(device=device)
    before = torch.accelerator.current_stream(device)
    with DefaultStager(options) as stager:
        torch.accelerator.set_stream(stream)
        try:
            source = slow_state(device)
            expected = {key: tensor.clone() for key, tensor in source.items()}
            staged = stager.stage(source)
            staged = staged if isinstance(staged, dict) else staged.result()
            source["w"].zero_()
        finally:
            torch.accelerator.set_stream(before)
        stream.synchronize()
        for key, tensor in expected.items():
            assert torch.equal(staged[key], tensor.cpu())


def test_blocking_stager_is_done_when_it_returns(device: torch.device) -> None:
    stager = BlockingAsyncStager(cache_staged_state_dict=True)
    for _ in range(2):
        source = slow_state(device)
        expected = source["w"].clone()
        staged = stager.stage(source)
        source["w"].zero_()
        assert torch.equal(staged["w"], expected.cpu())
    stager.close()


def test_a_failed_registration_leaves_no_error_behind(device: torch.device, reached: str) -> None:
    storage = torch.UntypedStorage(4096)
    if device.type != "cuda" and reached == "registered":
        pytest.skip("only CUDA's driver keeps an error")
    with pytest.warns(RuntimeWarning, match="could not pin"):
        assert not host_memory.pin(storage, 8, 1 << 60)
    assert torch.ones(3, device=device).sum().item() == 3


def test_sources_freed_by_the_trainer_are_still_copied_whole(device: torch.device) -> None:
    with DefaultStager(StagingOptions(use_pinned_memory=False)) as stager:
        values = slow_state(device)["w"]
        expected = values.clone()
        future = stager.stage({"w": values})
        del values
        torch.full_like(expected, 7.0)  # would take the freed memory
        assert torch.equal(future.result()["w"], expected.cpu())
