"""Ranks with tensors on devices: values that should be the same are compared, snapshots are replicated, shards come back."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.staging.ranks import run_ranks

_BODIES = "tests.device.rank_bodies"


@pytest.fixture(autouse=True)
def one_seed_is_enough(mode: str) -> None:
    if mode.startswith("seed ") and mode != "seed 0":
        pytest.skip("what ranks add to a snapshot does not depend on the seed")


def test_what_is_the_same_on_all_ranks_is_saved_once(tmp_path: Path) -> None:
    assert run_ranks(f"{_BODIES}:save_what_is_replicated", 2, tmp_path, False) == ["", ""]


def test_a_device_tensor_that_differs_between_ranks_is_told(tmp_path: Path) -> None:
    for text in run_ranks(f"{_BODIES}:save_what_is_replicated", 2, tmp_path, True):
        assert "large" in text and "small" not in text


def test_snapshots_of_device_tensors_are_replicated(tmp_path: Path) -> None:
    assert run_ranks(f"{_BODIES}:keep_replicas", 2, tmp_path) == [True, True]


def test_replication_stager_sends_what_kernels_still_compute(tmp_path: Path) -> None:
    assert run_ranks(f"{_BODIES}:exchange_by_stager", 2, tmp_path) == [[51.0, 51.0], [50.0, 50.0]]


def test_shards_on_devices_are_saved_and_loaded(tmp_path: Path) -> None:
    assert run_ranks(f"{_BODIES}:save_and_load_shards", 2, tmp_path) == [True, True]


def test_fsdp2_is_guarded_saved_and_loaded(tmp_path: Path) -> None:
    assert run_ranks(f"{_BODIES}:train_with_fsdp2", 1, tmp_path) == [[]]
