"""``staging.location: trainer``: nothing is shared, and the trainer copies all."""

from __future__ import annotations

import torch

from stager.sharing.sharer import SharingOptions, SourceSharer
from stager.state.copies import Copy
from stager.workers.memory.slab import Slab
from stager.workers.pool.pool import WorkerPool


def test_without_sharing_storages_stay_and_the_trainer_copies_all(lone_pool: WorkerPool) -> None:
    tensor, done = torch.zeros(1 << 20).share_memory_(), list[Copy]()
    private = torch.zeros(1 << 20)
    sharer = SourceSharer(lone_pool, 1, SharingOptions("trainer"))
    copies = [Copy(0, tensor.data_ptr(), 0, tensor.nbytes, (0,))]
    assert not sharer.share([tensor, private], may_move=True)
    assert not private.is_shared()
    assert sharer.split(copies, [tensor]) == (copies, [])
    assert sharer.live_sources() == frozenset()
    assert sharer.notes(str) == ()
    copied = sharer.copy([], Slab.create(tensor.nbytes), done.extend, lambda: done.extend(copies))
    assert done == copies
    assert not copied.results
    assert not copied.notes
