"""Whatever is changed, cut off, missing or added: full verification names it, and no load gives it out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stager.workers.checkpoint.formats import FORMATS
from tests.persistence.tasks import save
from tests.safety.damage import Tally, attack, every_value, run


@pytest.mark.parametrize("seed", [42, 45, 67], ids=["dcp", "torch", "safetensors, in chunks"])
def test_every_change_of_a_random_checkpoint_is_seen(tmp_path: Path, seed: int) -> None:
    tally = run(1, seed, tmp_path)
    assert tally.missed == []
    assert tally.tried["bytes changed"] > 1000 and tally.tried["truncations"] > 1000
    assert len(tally.tried) == 9


@pytest.mark.long
@pytest.mark.parametrize("block", range(10))
def test_every_change_of_200_random_checkpoints_is_seen(tmp_path: Path, block: int) -> None:
    tally = run(20, 1000 + block, tmp_path)
    assert tally.missed == []


@pytest.mark.long
@pytest.mark.parametrize("kind", sorted(FORMATS))
def test_every_other_value_of_every_byte_is_seen(tmp_path: Path, kind: str) -> None:
    tally = Tally()
    attack(save(tmp_path, {"x": torch.arange(3)}, kind=kind, num_parts=1, fsync=False), tally, every_value)
    assert tally.missed == []
