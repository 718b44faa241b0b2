"""The random generators come back exactly, through files that hold no pickled code."""

from __future__ import annotations

import io
import pickle
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stager import Checkpointer, PerRank, RngState
from stager.workers.checkpoint.formats import FORMATS


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Each generator is seeded, and has the second number of a pair waiting: that is a part of its state, too."""
    before = RngState().state_dict()
    torch.manual_seed(5)
    random.seed(5)
    random.gauss(0, 1)
    np.random.seed(5)
    np.random.standard_normal()
    yield
    RngState().load_state_dict(before)


def draw() -> list[Any]:
    return [
        torch.rand(5).tolist(),
        torch.randn(3).tolist(),
        [random.random() for _ in range(5)],
        [random.gauss(0, 1) for _ in range(3)],
        np.random.rand(5).tolist(),
        np.random.standard_normal(3).tolist(),
    ]


def test_generators_continue_from_the_stored_state() -> None:
    stored = io.BytesIO()
    torch.save(RngState().state_dict(), stored)
    expected = draw()
    assert draw() != expected
    stored.seek(0)
    RngState().load_state_dict(torch.load(stored, weights_only=True))
    assert draw() == expected


def test_state_can_be_gathered_from_ranks() -> None:
    """``dist.all_gather_object()`` pickles it with plain pickle, which cannot read every dtype of torch back."""
    stored = pickle.dumps(RngState().state_dict())
    expected = draw()
    RngState().load_state_dict(pickle.loads(stored))
    assert draw() == expected


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("wrap", [lambda value: value, PerRank], ids=["plain", "per-rank"])
def test_generators_continue_from_a_checkpoint(run_dir: Path, kind: str, wrap: Any) -> None:
    with Checkpointer(run_dir, {"persistence": {"format": kind}}) as ckpt:
        ckpt.save(1, {"rng": wrap(RngState())})
        expected = draw()
        draw()
        ckpt.load(into={"rng": wrap(RngState())})
    assert draw() == expected


def test_a_bit_generator_of_numpy_that_is_not_the_default_one(run_dir: Path) -> None:
    before = np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(np.random.PCG64(3))
        with Checkpointer(run_dir) as ckpt:
            ckpt.save(1, {"rng": RngState()})
            expected = draw()
            ckpt.load(into={"rng": RngState()})
        assert draw() == expected
    finally:
        np.random.set_bit_generator(before)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a process without devices")
def test_generators_of_devices_that_are_not_here_are_told(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved = RngState().state_dict() | {"devices": [torch.get_rng_state(), torch.get_rng_state()]}
    expected = draw()
    with Checkpointer(run_dir) as ckpt:
        ckpt.save(1, {"rng": saved})
        ckpt.load(into={"rng": RngState()})
    assert draw() == expected
    assert "the generators of 2 devices, and this process has 0 devices" in caplog.text
