"""A power failure at any moment of a save leaves what was there before, or the new one; and once it is over, that one."""

from __future__ import annotations

from pathlib import Path

import pytest

from stager.workers.checkpoint.storage.posix import files
from stager.workers.checkpoint.storage.posix.file_sink import FileSink
from tests.safety.crash_order import CASES, replay

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.mark.parametrize("name", CASES)
def test_every_prefix_of_a_save_is_the_old_state_or_the_new_one(tmp_path: Path, name: str) -> None:
    result = replay(name, tmp_path, seed=1, num_random=0)
    assert result.violations == []
    assert result.prefixes == result.calls + 1 > 7 and result.distinct > 9
    assert result.seen["new"] and (result.seen["old"] or "manifest" in name)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("name", CASES)
def test_every_prefix_with_many_subsets_of_what_was_not_synced(tmp_path: Path, name: str, seed: int) -> None:
    assert replay(name, tmp_path, seed=seed, num_random=100).violations == []


def test_names_that_are_not_synced_would_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model has teeth: a commit that forgets its last sync loses checkpoints."""
    monkeypatch.setattr(files, "sync_directory", lambda path: None)
    assert any("is lost" in line for line in replay("first save", tmp_path, seed=1, num_random=0).violations)


def test_bytes_that_are_not_synced_would_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that signs its receipt before its files are on the disk."""
    monkeypatch.setattr(FileSink, "sync", lambda self: None)
    violations = replay("first save", tmp_path, seed=1, num_random=0).violations
    assert any("damaged checkpoint under the name of a whole one" in line for line in violations)
