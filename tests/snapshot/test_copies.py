"""Copies into the slab: many small ones in one system call, large ones in pieces, nothing outside of the slab."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stager.snapshot.batches import Gather, Move, batch
from stager.snapshot.copying import Copier
from stager.state.copies import SMALL_BYTES, Copy
from stager.workers.errors import InternalError
from stager.workers.memory.slab import Slab
from tests.snapshot.staged import Bench, tensors_are_staged

SIZES = st.lists(
    st.one_of(st.integers(1, 70), st.integers(1000, 1100), st.integers(SMALL_BYTES - 2, SMALL_BYTES + 2)), max_size=40
)


@pytest.fixture
def copier() -> Iterator[Copier]:
    copier = Copier(2, 1)
    yield copier
    copier.close()


@settings(deadline=None, max_examples=50)
@given(sizes=SIZES, background=st.booleans(), cold=st.booleans())
def test_tensors_of_any_size_are_staged_exactly(sizes: list[int], background: bool, cold: bool) -> None:
    bench = Bench()
    state = {str(i): torch.randint(0, 256, (n,), dtype=torch.uint8) for i, n in enumerate(sizes)}
    slab, snapshot = bench.stage(state, cold=cold, background=background)
    assert tensors_are_staged(state, slab, snapshot.plan)
    bench.close()


def test_small_tensors_share_system_calls_within_the_kernels_limit() -> None:
    tensors = [torch.full((256,), float(i)) for i in range(3000)] + [torch.tensor(1.0) for _ in range(3000)]
    bench = Bench()
    slab, snapshot = bench.stage({str(i): t for i, t in enumerate(tensors)})
    gathers = batch(snapshot.plan.copies).on_host
    assert all(isinstance(work, Gather) and len(work.vectors) <= 1024 for work in gathers)
    assert len(gathers) <= 12  # 3,000 + 2 x 3,000 vectors, the gaps between the small ones included
    assert tensors_are_staged({str(i): t for i, t in enumerate(tensors)}, slab, snapshot.plan)
    bench.close()


def test_large_tensors_are_cut_into_pieces_that_tile_them() -> None:
    work = batch([Copy(0, 1 << 40, 64, 100_000_001, (0,))]).on_host
    assert all(isinstance(piece, Move) for piece in work)
    assert work[0].slab_offset == 64 and sum(piece.nbytes for piece in work) == 100_000_001
    assert all(b.slab_offset == a.slab_offset + a.nbytes for a, b in pairwise(work))
    assert all(piece.address - (1 << 40) == piece.slab_offset - 64 for piece in work)


@pytest.mark.parametrize("work", [Move(1, -1, 1), Move(1, 4096, 1), Gather(np.zeros((1, 2), np.uint64), 4095, 2)])
def test_copy_outside_of_the_slab_is_refused(copier: Copier, work: Move | Gather) -> None:
    slab = Slab.create(4096)
    batches = batch([])
    with pytest.raises(InternalError, match="outside of slab"):
        copier.copy(type(batches)((), (work,), ()), [], slab)


def test_background_copies_leave_the_calling_thread_and_its_priority_alone(copier: Copier) -> None:
    source = torch.ones(50 << 20, dtype=torch.uint8)
    slab = Slab.create(source.nbytes)
    batches = batch([Copy(0, source.data_ptr(), 0, source.nbytes, (0,))])
    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    copier.copy(batches, [source], slab, background=True)
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("stager-copy")]
    assert [os.getpriority(os.PRIO_PROCESS, thread.native_id) for thread in threads] == [min(19, before + 10)]
    assert bytes(slab.view[-3:]) == b"\1\1\1"
