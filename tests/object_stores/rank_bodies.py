"""What ranks do whose checkpoints are in an object store."""

from __future__ import annotations

from pathlib import Path

import torch

from stager import Checkpointer, DirectoryInUseError, RankFailedError
from tests.ranks.bodies import CONFIG, FOR_EVER_SECS, state_of
from tests.ranks.layouts import build, differences, whole_state

PATIENT = {**CONFIG, "ranks": {"timeout_secs": FOR_EVER_SECS}}
"""What waits without need fails the test."""


def save(rank: int, directory: str, run_url: str, layout: str) -> int:
    """Three saves, of which two are kept, one by one. What the last one holds is in ``expected.pt``. Returns its step."""
    trained = build(layout, seed=3)
    with Checkpointer(run_url, {**PATIENT, "retention": {"keep_latest": 2}}) as ckpt:
        for step in (5, 6, 7):
            ckpt.save(step, state_of(trained, rank), files={"who.txt": b"rank 0"}).upload_completion.result(60)
        newest = ckpt.latest()
    expected = whole_state(trained)
    if rank == 0:
        torch.save(expected, Path(directory, "expected.pt"))
    assert newest is not None
    return newest.step


def load(rank: int, directory: str, run_url: str, layout: str) -> list[str]:
    """Where what was loaded, on however many ranks, differs from what was saved."""
    trained = build(layout, seed=11)
    with Checkpointer(run_url, PATIENT) as ckpt:
        loaded = ckpt.load(into=state_of(trained, rank))
    assert loaded is not None and loaded.step == 7 and loaded.files["who.txt"] == b"rank 0"
    return differences(torch.load(Path(directory, "expected.pt")), whole_state(trained))


def refused(rank: int, directory: str, run_url: str) -> str:
    """What a rank is told whose run somebody else has."""
    config = {**CONFIG, "persistence": {"lock_timeout_secs": 0.5}}
    try:
        with Checkpointer(run_url, config):
            return "nothing"
    except (DirectoryInUseError, RankFailedError) as error:
        return f"{type(error).__name__}: {error}"
