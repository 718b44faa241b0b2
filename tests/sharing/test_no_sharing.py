"""``staging.location: trainer``: the saver gets a sharer that shares nothing."""

from __future__ import annotations

import inspect

import torch

from stager.sharing.sharer import NoSharing, SharingOptions, SourceSharer, make_sharer
from stager.state.placement import Copy
from stager.workers.memory.slab import Slab
from stager.workers.pool.pool import WorkerPool


def test_location_chooses_the_sharer(lone_pool: WorkerPool) -> None:
    assert isinstance(make_sharer(lone_pool, 1, SharingOptions("trainer")), NoSharing)
    for location in ("auto", "workers"):
        assert isinstance(make_sharer(lone_pool, 1, SharingOptions(location)), SourceSharer)


def test_without_sharing_storages_stay_and_the_trainer_copies_all() -> None:
    sharer, tensor, done = NoSharing(), torch.zeros(1 << 20), list[Copy]()
    copies = [Copy(0, tensor.data_ptr(), 0, tensor.nbytes, (0,))]
    sharer.share([tensor], may_move=True)
    assert not tensor.is_shared()
    assert sharer.split(copies, [tensor]) == (copies, [])
    assert sharer.live_sources() == frozenset()
    assert sharer.notes(str) == ()
    copied = sharer.copy(copies[:1], Slab.create(tensor.nbytes), done.extend, copies)
    assert done == copies * 2
    assert not copied.results
    assert not copied.notes


def test_no_sharing_has_the_methods_of_a_sharer() -> None:
    for name, method in inspect.getmembers(SourceSharer, inspect.isfunction):
        if not name.startswith("_"):
            assert inspect.signature(getattr(NoSharing, name)) == inspect.signature(method), name
