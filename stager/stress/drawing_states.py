"""Draws what is trained: a model, an optimizer, and a menagerie of other values."""

from __future__ import annotations

import random
from collections.abc import Iterator

from stager.stress.states import DTYPES, NEVER, LeafKind, LeafSpec, dtype_of
from stager.stress.training import TrainingSpec

_VIEWS: tuple[LeafKind, ...] = ("tied", "slice", "transposed", "strided")
_OBJECTS: tuple[LeafKind, ...] = ("object", "text", "set", "custom")


def draw_training(rng: random.Random, num_steps: int, max_nbytes: int) -> TrainingSpec:
    """A training run whose state has at most about ``max_nbytes`` bytes."""
    leaves = _draw_leaves(rng, num_steps, int(max_nbytes * rng.choice((0.02, 0.2, 0.7))))
    return TrainingSpec(
        seed=rng.randrange(1 << 30),
        width=rng.choice((8, 16, 48)),
        depth=rng.choice((1, 2, 4)),
        tied=rng.random() < 0.5,
        optimizer=rng.choice(("adamw", "sgd")),
        leaves=tuple(leaves),
    )


def _draw_leaves(rng: random.Random, num_steps: int, budget: int) -> Iterator[LeafSpec]:
    """Few big tensors, or many small ones, and around them one of each oddity, more or less."""
    big = rng.random() < 0.5
    count = rng.randint(1, 4) if big else rng.randint(20, 150)
    index = 0
    for _ in range(count):
        dtype = rng.choice(DTYPES)
        nbytes = budget // count // 2 if big else rng.randint(1, max(2, min(4096, budget // count)))
        base = _with_life(rng, num_steps, "tensor", dtype, max(1, nbytes // dtype_of(dtype).itemsize))
        yield base
        base_index, index = index, index + 1
        for kind in _VIEWS:
            if rng.random() < (0.4 if big else 0.03):
                yield LeafSpec(kind, dtype, 0, base_index, base.born, base.dies, base.resized)
                index += 1
    for kind in ("scalar", "empty"):
        if rng.random() < 0.6:
            yield _with_life(rng, num_steps, kind, rng.choice(DTYPES), int(kind == "scalar"))
    for kind in _OBJECTS:
        if rng.random() < 0.5:
            yield _with_life(rng, num_steps, kind, "float32", 0)


def _with_life(rng: random.Random, num_steps: int, kind: LeafKind, dtype: str, numel: int) -> LeafSpec:
    """Most are there from the start to the end; some come, go, or grow."""
    born, dies, resized = 0, NEVER, NEVER
    fate = rng.random()
    if fate < 0.1:
        born = rng.randrange(num_steps)
    elif fate < 0.2:
        dies = rng.randrange(1, num_steps + 1)
    elif fate < 0.3 and kind == "tensor":
        resized = rng.randrange(1, num_steps + 1)
    return LeafSpec(kind, dtype, numel, -1, born, dies, resized)
