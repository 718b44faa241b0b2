"""Items of one stretch of memory, copied to their places: whatever their sizes, their order and their kind of target."""

from __future__ import annotations

import random

import numpy as np
import pytest

from stager.workers.checkpoint.read.scatter import scatter


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("sizes", [[1024], [1, 2, 3], [0, 8, 4096], [70_000], list(range(200))])
@pytest.mark.parametrize("with_views", [False, True])
def test_each_item_is_copied_to_its_target_and_nothing_else_is_touched(
    sizes: list[int], seed: int, with_views: bool
) -> None:
    rng = random.Random(seed)
    nbytes = [rng.choice(sizes) for _ in range(rng.choice([1, 7, 8, 9, 150]))]
    gap = rng.randrange(3)
    offsets = np.cumsum([gap, *(size + gap for size in nbytes)])[:-1]
    memory = np.frombuffer(rng.randbytes(int(sum(nbytes)) + gap * (len(nbytes) + 1)), np.uint8).copy()
    places = rng.sample(range(len(nbytes)), len(nbytes))  # the targets lie in another order than the items
    starts = np.zeros(len(nbytes), np.int64)
    starts[places] = np.cumsum([5, *(nbytes[place] + 1 for place in places)])[:-1]
    target = np.full(sum(nbytes) + len(nbytes) + 10, 251, np.uint8)
    expected = target.copy()
    for start, offset, size in zip(starts, offsets, nbytes, strict=True):
        expected[start : start + size] = memory[offset : offset + size]
    targets = [
        target.data[start : start + size] if with_views and rng.random() < 0.5 else target.ctypes.data + int(start)
        for start, size in zip(starts.tolist(), nbytes, strict=True)
    ]
    scatter(memory, offsets, np.array(nbytes, np.int64), targets)
    assert (target == expected).all()


def test_empty_items_have_no_address() -> None:
    """The address of an empty tensor is 0."""
    scatter(np.zeros(4, np.uint8), np.zeros(20, np.int64), np.zeros(20, np.int64), [0] * 20)
    scatter(np.zeros(0, np.uint8), np.zeros(0, np.int64), np.zeros(0, np.int64), [])
