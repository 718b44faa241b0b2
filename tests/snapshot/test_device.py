"""Small device tensors are gathered into one transfer. The packing is the same on any device: here it is the CPU."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from stager.snapshot import device
from stager.state.fingerprint import Fingerprint
from stager.state.placement import Copy, place
from stager.workers.memory.slab import Slab
from tests.states import bits


class _Streams:
    """Stands for the side streams; counts what is waited for."""

    def __init__(self) -> None:
        self.synchronized = 0

    def stream(self) -> Any:
        return nullcontext()

    def synchronize(self) -> None:
        self.synchronized += 1


def _copies(leaves: list[torch.Tensor]) -> tuple[list[Copy], int]:

    rows = [
        (i, Fingerprint(t.data_ptr(), t.dtype, t.shape, t.stride(), t.device, t.is_conj()))
        for i, t in enumerate(leaves)
    ]
    placed = place(rows, {})
    return list(placed.copies), placed.nbytes


def test_small_tensors_cross_in_one_transfer_and_large_ones_alone() -> None:
    leaves = [torch.randn(n) for n in (3, 100, 1, 40_000, 7)] + [torch.randn(5, dtype=torch.float64).to(torch.bfloat16)]
    copies, nbytes = _copies(leaves)
    groups = [[copy.leaf for copy in group] for group in device._groups(copies, leaves)]
    assert groups == [[3], [0, 1, 2, 4, 5]]
    slab = Slab.create(nbytes)
    device.enqueue(copies, leaves, slab, _Streams())
    for copy in copies:
        assert bytes(slab.view[copy.slab_offset : copy.slab_offset + copy.nbytes]) == bits(leaves[copy.leaf])


def test_thousands_of_tensors_of_every_dtype_are_packed_exactly() -> None:
    generator = torch.Generator().manual_seed(1)
    dtypes = [torch.float32, torch.float16, torch.uint8, torch.complex64, torch.int64, torch.bool]
    leaves = [
        torch.randint(0, 2, (int(torch.randint(1, 300, (), generator=generator)),), generator=generator).to(
            dtypes[i % 6]
        )
        for i in range(2000)
    ]
    copies, nbytes = _copies(leaves)
    assert len(list(device._groups(copies, leaves))) == 1
    slab = Slab.create(nbytes)
    device.enqueue(copies, leaves, slab, _Streams())
    for copy in copies:
        assert bytes(slab.view[copy.slab_offset : copy.slab_offset + copy.nbytes]) == bits(leaves[copy.leaf])


def test_group_never_takes_more_device_memory_than_its_limit(monkeypatch: Any) -> None:
    monkeypatch.setattr(device, "_PACK_BYTES", 10_000)
    leaves = [torch.randn(256) for _ in range(40)]
    copies, _ = _copies(leaves)
    for group in device._groups(copies, leaves):
        assert group[-1].slab_offset + group[-1].nbytes - group[0].slab_offset <= 10_000


def test_packed_copy_is_never_gathered() -> None:
    base = torch.randn(8, 8)
    leaves = [torch.randn(4), base[:, 2], torch.randn(4)]
    copies, nbytes = _copies(leaves)
    slab = Slab.create(nbytes)
    device.enqueue(copies, leaves, slab, _Streams())
    packed = next(copy for copy in copies if copy.address < 0)
    assert bytes(slab.view[packed.slab_offset : packed.slab_offset + packed.nbytes]) == bits(leaves[1])
