"""Which save is restored from memory."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from stager import Checkpointer
from stager.ranks.messages import OfferedReplica, RestorePlan
from stager.replication.candidates import Candidates


def offered(step: int, *owners: int, num_ranks: int = 2, created: float = 0.0, name: str = "") -> list[OfferedReplica]:
    """Each owner's by a host of its own."""
    return [
        OfferedReplica(
            f"host-{owner}", owner, step, name or f"save {step}", num_ranks, created or 4e9 + step, f"step-{step:08d}"
        )
        for owner in owners
    ]


def pick(
    run: Path, *saves: list[OfferedReplica], damaged: tuple[int, ...] = (), tried: list[RestorePlan] | None = None
) -> RestorePlan | None:
    return Candidates(str(run), list(itertools.chain(*saves)), damaged).pick(tried or [])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """With checkpoints of steps 1 and 2."""
    with Checkpointer(tmp_path / "run") as ckpt:
        for step in (1, 2):
            ckpt.save(step, {"x": torch.ones(3)})
    return tmp_path / "run"


def test_the_newest_that_is_whole_is_taken(run: Path) -> None:
    plan = pick(run, offered(3, 0, 1), offered(5, 0), offered(4, 0, 1))
    assert plan is not None
    assert (plan.step, plan.save_id, plan.owners) == (4, "save 4", {"host-0": (0,), "host-1": (1,)})
    assert plan.written_as != plan.save_id  # nothing is there of it


def test_what_is_not_newer_than_the_disk_is_not_taken(run: Path) -> None:
    assert pick(run, offered(1, 0, 1), offered(2, 0, 1)) is None
    plan = pick(run, offered(1, 0, 1), offered(2, 0, 1), damaged=(2,))
    assert plan is not None and plan.step == 2


def test_what_the_run_has_turned_back_from_is_not_taken(run: Path) -> None:
    """Step 9 was saved before step 2."""
    assert pick(run, offered(9, 0, 1, created=1.0)) is None


def test_saves_are_in_order_by_one_clock(tmp_path: Path) -> None:
    """That of the first rank; rank 1's is a minute ahead."""
    one = offered(1, 1, created=60.0) + offered(1, 0, created=1.0)
    two = offered(2, 0, created=30.0) + offered(2, 1, created=90.0)
    plan = pick(tmp_path, one, two)
    assert plan is not None and plan.save_id == "save 2"


def test_what_was_tried_is_not_tried_again_and_what_was_there_of_it_not_trusted(run: Path) -> None:
    partial = run / "step-00000003.partial-ab"
    partial.mkdir()
    (partial / "receipt-0-0-of-1.json").write_text("")
    save = offered(3, 0, 1, name="ab")
    first = pick(run, save)
    assert first is not None
    assert (first.written_as, first.owners) == ("ab", {"host-1": (1,)})
    second = pick(run, save, tried=[first])
    assert second is not None
    assert second.written_as != "ab"
    assert second.owners == {"host-0": (0,), "host-1": (1,)}
    assert pick(run, save, tried=[first, second]) is None
    partial.joinpath("receipt-0-0-of-1.json").unlink()
    partial.rmdir()


def test_the_newest_in_memory(tmp_path: Path) -> None:
    assert Candidates(str(tmp_path), [], ()).newest_in_memory() == ""
    saves = offered(3, 0, 1) + offered(5, 0) + offered(4, 0, 1)
    assert Candidates(str(tmp_path), saves, ()).newest_in_memory() == "save 4"
