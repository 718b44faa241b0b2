"""From the second save on, the training thread waits for no other rank."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.staging.ranks import run_ranks


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_no_collective_and_no_request_to_the_store(layout: str, tmp_path: Path) -> None:
    assert run_ranks("tests.ranks.bodies:save_without_collectives", 2, tmp_path, layout) == [5, 5]


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_guarded_snapshots_are_those_of_their_step(layout: str, tmp_path: Path) -> None:
    assert run_ranks("tests.ranks.bodies:guarded", 2, tmp_path, layout) == [[], []]
