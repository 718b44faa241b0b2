"""Small tensors are gathered on their device into one transfer, large ones cross alone; some through buffers between."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stager.snapshot import device_copies
from stager.state.copies import Copy
from stager.state.fingerprint import read_fingerprints
from stager.state.placement import place
from stager.state.state_tree import StateTree
from stager.workers.device.host_memory import can_register, pin
from stager.workers.device.streams import SideStreams
from stager.workers.memory.slab import Slab
from tests.device.conftest import SIMULATED
from tests.states import bits

pytestmark = pytest.mark.usefixtures("reached")


def _copies(leaves: list[torch.Tensor]) -> tuple[list[Copy], int]:
    fingerprints, _ = read_fingerprints(StateTree(leaves=list(leaves)))
    table = fingerprints.table()
    is_packed = np.array([leaf.is_conj() or not leaf.is_contiguous() for leaf in leaves])
    placed = place(table, np.full(len(leaves), -1), is_packed)
    return list(placed.copies), placed.nbytes


def _copied(leaves: list[torch.Tensor]) -> tuple[list[Copy], Slab]:
    """Copy on side streams, and wait."""
    copies, nbytes = _copies(leaves)
    slab = Slab.create(nbytes)
    if can_register():
        pin(slab.storage, slab.address, slab.nbytes)
    streams = SideStreams({leaf.device for leaf in leaves})
    device_copies.enqueue(copies, leaves, slab, streams)
    streams.synchronize()
    return copies, slab


def _assert_exact(leaves: list[torch.Tensor], copies: list[Copy], slab: Slab) -> None:
    for copy in copies:
        found = bytes(slab.view[copy.slab_offset : copy.slab_offset + copy.nbytes])
        assert found == bits(leaves[copy.leaf].cpu())


def test_small_tensors_cross_in_one_transfer_and_large_ones_alone(device: torch.device) -> None:
    leaves = [torch.randn(n, device=device) for n in (3, 100, 1, 40_000, 7)]
    leaves.append(torch.randn(5, dtype=torch.float64, device=device).to(torch.bfloat16))
    copies, _ = _copies(leaves)
    groups = [[copy.leaf for copy in group] for group in device_copies._groups(copies, leaves)]
    assert groups == [[3], [0, 1, 2, 4, 5]]
    copies, slab = _copied(leaves)
    _assert_exact(leaves, copies, slab)


def test_thousands_of_tensors_of_every_dtype_are_packed_exactly(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(1)
    dtypes = [torch.float32, torch.float16, torch.uint8, torch.complex64, torch.int64, torch.bool]
    sizes = torch.randint(1, 300, (2000,), generator=generator).tolist()
    leaves = [
        torch.randint(0, 2, (size,), generator=generator).to(dtypes[i % 6]).to(device) for i, size in enumerate(sizes)
    ]
    assert len(list(device_copies._groups(_copies(leaves)[0], leaves))) == 1
    copies, slab = _copied(leaves)
    _assert_exact(leaves, copies, slab)


@pytest.mark.skipif(not SIMULATED, reason="only the simulated accelerator counts")
@pytest.mark.parametrize("count", [10, 2000])
def test_many_tensors_take_one_transfer_one_launch_and_one_wait(device: torch.device, reached: str, count: int) -> None:
    from tests.accelerator import device as simulated

    leaves = [torch.full((n % 100 + 1,), float(n), device=device) for n in range(count)]
    torch.accelerator.synchronize()
    simulated.reset_counters()
    _copied(leaves)
    counted = simulated.counters()
    assert counted["copies_to_host"] == 1
    assert counted["kernels"] <= 2  # one multi-tensor copy for each width of elements
    assert counted["synchronizations"] == (1 if reached == "registered" else 2)
    assert counted["blocking_copies"] == counted["waits_of_default"] == 0


def test_group_never_takes_more_device_memory_than_its_limit(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_copies, "_PACK_BYTES", 10_000)
    leaves = [torch.randn(256, device=device) for _ in range(40)]
    for group in device_copies._groups(_copies(leaves)[0], leaves):
        assert group[-1].slab_offset + group[-1].nbytes - group[0].slab_offset <= 10_000
    copies, slab = _copied(leaves)
    _assert_exact(leaves, copies, slab)


def test_packed_copy_is_never_gathered(device: torch.device) -> None:
    base = torch.randn(8, 8, device=device)
    leaves = [torch.randn(4, device=device), base[:, 2], torch.randn(4, device=device)]
    copies, slab = _copied(leaves)
    assert any(copy.is_packed for copy in copies)
    _assert_exact(leaves, copies, slab)


def test_tensors_larger_than_the_buffers_between_cross_in_parts(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_copies, "_BOUNCE_BYTES", 1000)
    leaves = [torch.randn(n, device=device) for n in (20_000, 777, 30_001)]
    copies, slab = _copied(leaves)
    _assert_exact(leaves, copies, slab)
