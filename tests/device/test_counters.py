"""What a save costs the device, as the simulated accelerator counts it; and a device that has no memory left."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stager import Checkpointer
from stager.snapshot import device_copies
from tests.device.conftest import SIMULATED

if SIMULATED:
    from tests.accelerator import device as simulated

pytestmark = [
    pytest.mark.skipif(not SIMULATED, reason="only the simulated accelerator counts"),
    pytest.mark.usefixtures("reached"),
]


@pytest.fixture(autouse=True)
def one_mode_is_enough(mode: str) -> None:
    if mode.startswith("seed ") and mode != "seed 0":
        pytest.skip("counts do not depend on when operations run")


def _counted_save(
    run_dir: Path, state: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer | None = None
) -> dict[str, int]:
    """Count the second save, whose plan is there already, from ``save()`` to the end of staging."""
    with Checkpointer(run_dir) as ckpt:
        if optimizer is not None:
            ckpt.guard(optimizer)
        ckpt.save(0, state).upload_completion.result()
        torch.accelerator.synchronize()
        simulated.reset_counters()
        held = torch.sim.memory_allocated()  # type: ignore[attr-defined]  # the simulated accelerator's module
        handle = ckpt.save(1, state)
        handle.staging_completion.result()
        counts = simulated.counters()
        counts["memory"] = torch.sim.max_memory_allocated() - held  # type: ignore[attr-defined]  # the simulated backend, which the stubs do not know
        handle.upload_completion.result()
    return counts


def _assert_waits(counts: dict[str, int], reached: str, num_devices: int = 1) -> None:
    # With buffers between, the host also waits for each transfer, to copy on from there.
    transfers = 0 if reached == "registered" else counts["copies_to_host"]
    assert counts["synchronizations"] == num_devices + transfers
    assert counts["waits"] == num_devices  # each side stream waits for the trainer's
    assert counts["waits_of_default"] == counts["blocking_copies"] == 0  # the trainer's streams wait for nothing


@pytest.mark.parametrize("count", [3, 300])
@pytest.mark.parametrize("nbytes", [1 << 10, 100 << 10])
def test_one_synchronisation_however_many_tensors(
    run_dir: Path, device: torch.device, reached: str, count: int, nbytes: int
) -> None:
    counts = _counted_save(run_dir, {f"w{n}": torch.zeros(nbytes // 4, device=device) for n in range(count)})
    is_small = nbytes <= 64 << 10
    assert (counts["copies_to_host"], counts["kernels"]) == ((1, 1) if is_small else (count, 0))
    assert counts["memory"] <= (2 * count * nbytes if is_small else 0)
    _assert_waits(counts, reached)


def test_a_guarded_save_has_one_synchronisation_too(run_dir: Path, device: torch.device, reached: str) -> None:
    parameters = [torch.nn.Parameter(torch.zeros(1000, device=device)) for _ in range(50)]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    counts = _counted_save(run_dir, {f"w{n}": parameter for n, parameter in enumerate(parameters)}, optimizer)
    assert counts["copies_to_host"] == counts["kernels"] == 1
    _assert_waits(counts, reached)


def test_two_devices_have_one_synchronisation_each(
    run_dir: Path, device: torch.device, other_device: torch.device, reached: str
) -> None:
    state = {f"w{n}": torch.zeros(100, device=(device, other_device)[n % 2]) for n in range(100)}
    counts = _counted_save(run_dir, state)
    assert counts["copies_to_host"] == counts["kernels"] == 2
    _assert_waits(counts, reached, 2)


def test_twenty_thousand_small_tensors_cross_in_one_transfer(
    run_dir: Path, device: torch.device, mode: str, reached: str
) -> None:
    if (mode, reached) != ("late", "registered"):
        pytest.skip("so many tensors take seconds")
    tensors = torch.zeros(20_000, 256, device=device).unbind()
    counts = _counted_save(run_dir, {f"w{n}": tensor for n, tensor in enumerate(tensors)})
    assert counts["copies_to_host"] == counts["kernels"] == 1
    assert counts["bytes_to_host"] == 20_000 * 1024
    assert counts["memory"] <= device_copies._PACK_BYTES
    _assert_waits(counts, reached)


def test_a_device_that_is_full_is_saved_and_loaded_all_the_same(run_dir: Path, device: torch.device) -> None:
    state = {f"w{n}": torch.full((100,), float(n), device=device) for n in range(100)}
    simulated.set_memory_limit(torch.sim.memory_allocated() + 1000)  # type: ignore[attr-defined]  # the simulated backend, which the stubs do not know
    try:
        with Checkpointer(run_dir) as ckpt:
            ckpt.save(0, state).upload_completion.result()
            for tensor in state.values():
                tensor.zero_()
            simulated.reset_counters()
            ckpt.load(into=state)
        assert simulated.counters()["copies_to_device"] == 100  # each alone
    finally:
        simulated.set_memory_limit(8 << 30)
    assert [int(tensor[0].item()) for tensor in state.values()] == list(range(100))
