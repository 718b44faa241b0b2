"""What only a GPU can show. None of these has been run yet on the machines this was written on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stager.torch_api.staging import DefaultStager, StagingOptions
from stager.torch_api.staging.state_dict_stager import StateDictStager

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def slow_state() -> dict[str, Any]:
    """Values that a queue of kernels is still computing when this returns."""
    x = torch.ones(2048, 2048, device="cuda") / 2048
    for _ in range(200):
        x = x @ x
        x = x / x.sum() * 2048
    return {"w": x, "view": x[3:9], "conj": torch.ones(4, dtype=torch.complex64, device="cuda").mul_(1j).conj()}


@pytest.mark.parametrize("share_memory", [False, True])
@pytest.mark.parametrize("pin_memory", [False, True])
def test_pinned_and_shared(pin_memory: bool, share_memory: bool) -> None:
    source = {"w": torch.randn(64, 64, device="cuda"), "big": torch.randn(1 << 20, device="cuda")}
    staged = StateDictStager(pin_memory, share_memory).stage(source)
    torch.cuda.synchronize()
    for key, tensor in staged.items():
        assert torch.equal(tensor, source[key].cpu())
        assert (tensor.is_pinned(), tensor.is_shared()) == (pin_memory, share_memory)


def test_async_staging_waits_for_the_trainers_kernels() -> None:
    with DefaultStager(StagingOptions()) as stager:
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):  # the trainer is on a stream of its own
            source = slow_state()
            staged = stager.stage(source).result()
        side.synchronize()
        for key, tensor in source.items():
            assert torch.equal(staged[key], tensor.cpu())


def test_a_failed_registration_leaves_no_error_behind() -> None:
    from stager.workers.memory import pinning

    storage = torch.UntypedStorage(4096)
    with pytest.warns(RuntimeWarning):
        assert not pinning.pin(storage, 8, 1 << 60)
    assert torch.ones(3, device="cuda").sum().item() == 3


def test_sources_freed_by_the_trainer_are_still_copied_whole() -> None:
    with DefaultStager(StagingOptions()) as stager:
        values = slow_state()["w"]
        expected = values.clone()
        future = stager.stage({"w": values})
        del values
        torch.full((2048, 2048), 7.0, device="cuda")  # would take the freed memory
        assert torch.equal(future.result()["w"], expected.cpu())
