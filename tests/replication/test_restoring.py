"""What the partners' memory holds, and the disk does not, is there again when the job is begun anew."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stager import Checkpointer
from stager.workers.checkpoint.commit.replica import read_header
from tests.ranks.bodies import flip
from tests.replication import bodies
from tests.small_disk import small_disk_at
from tests.staging.child import run
from tests.staging.ranks import run_ranks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk_at(tmp_path / "small", 16 << 10) as mount:
        yield mount


def ranks(target: str, num_ranks: int, directory: Path, *args: Any) -> list[Any]:
    for path in [directory / "store", *directory.glob("result-*.json")]:
        path.unlink(missing_ok=True)
    return run_ranks(f"tests.replication.bodies:{target}", num_ranks, directory, *args)


def memory_of(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / "memory").rglob("*") if path.is_file())


def checkpoint(directory: Path, step: int) -> Path:
    return directory / "run" / f"step-{step:08d}"


@pytest.mark.parametrize(("before", "after"), [pytest.param(2, 2, marks=pytest.mark.long), (3, 2), (2, 4)])
def test_a_job_whose_disk_is_gone_goes_on_from_its_partners_memory(before: int, after: int, tmp_path: Path) -> None:
    assert ranks("save_and_die", before, tmp_path, 2) == [None] * before
    shutil.rmtree(tmp_path / "run")
    results = ranks("resume", after, tmp_path, 2)
    for rank, result in enumerate(results):
        assert (result["step"], result["steps"], result["problems"]) == (2, [2], [])
        assert result["own"] == rank  # the second job's own where the first had fewer ranks
    assert any(f"the parts of {before} ranks were written from their partners' memory" in s for s in results[0]["said"])
    with Checkpointer(tmp_path / "run", read_only=True) as ckpt:
        found = ckpt.latest()
    assert found is not None and found.step == 2
    assert memory_of(tmp_path) == []  # the second job has closed with everything on the disk


def test_one_process_alone_restores_what_several_ranks_left(tmp_path: Path) -> None:
    ranks("save_and_die", 2, tmp_path, 2)
    shutil.rmtree(tmp_path / "run")
    result = run("tests.replication.bodies:resume_alone", str(tmp_path), 2)
    assert (result["step"], result["problems"]) == (2, [])
    assert any("no other process keeps a copy" in text for text in result["said"])


def test_what_is_on_the_disk_is_older(tmp_path: Path) -> None:
    ranks("save_and_die", 2, tmp_path, 3)
    shutil.rmtree(checkpoint(tmp_path, 3))
    for result in ranks("resume", 2, tmp_path, 3):
        assert (result["step"], result["steps"], result["problems"]) == (3, [1, 2, 3], [])


def test_what_is_on_the_disk_is_not_touched_when_it_is_whole(tmp_path: Path) -> None:
    ranks("save_and_die", 2, tmp_path, 2)
    before = os.stat(checkpoint(tmp_path, 2)).st_ino
    for result in ranks("resume", 2, tmp_path, 2):
        assert (result["step"], result["problems"], result["said"]) == (2, [], [])
    assert os.stat(checkpoint(tmp_path, 2)).st_ino == before


@pytest.mark.parametrize("how", ["truncated", "flipped"])
def test_what_is_on_the_disk_is_damaged(how: str, tmp_path: Path) -> None:
    """A truncated file is seen when the run is opened, flipped bytes when they are read."""
    ranks("save_and_die", 2, tmp_path, 2)
    path = checkpoint(tmp_path, 2) / "__1_0.distcp"
    if how == "truncated":
        os.truncate(path, 100)
    else:
        flip(path)
    for result in ranks("resume", 2, tmp_path, 2):
        assert (result["step"], result["steps"], result["problems"]) == (2, [1, 2], [])
    with Checkpointer(tmp_path / "run", {"loading": {"verify": "full"}}, read_only=True) as ckpt:
        found = ckpt.latest()
    assert found is not None and found.step == 2


def test_a_host_dies_before_its_part_is_written(tmp_path: Path) -> None:
    """Its partner writes it; what the others had written is used as it is."""
    ranks("die_before_the_parts_are_written", 3, tmp_path, 1)
    results = ranks("resume", 2, tmp_path, 2)
    for result in results:
        assert (result["step"], result["steps"], result["problems"]) == (2, [1, 2], [])
    assert any("the parts of 1 ranks were written" in text for text in results[0]["said"])


def test_a_host_dies_and_the_others_live_until_the_save_has_failed(tmp_path: Path) -> None:
    """What they had written stays: of the ranks whose partner was on that host, there is no other copy."""
    assert ranks("outlive_a_host", 3, tmp_path, 1) == [None] * 3
    for replica in [*(tmp_path / "memory").rglob("rank-0.*")]:  # rank 1 kept them
        replica.unlink()
    results = ranks("resume", 2, tmp_path, 2)
    for result in results:
        assert (result["step"], result["steps"], result["problems"]) == (2, [1, 2], [])
    assert any("the parts of 1 ranks were written" in text for text in results[0]["said"])


def test_what_is_there_of_a_save_that_failed_is_removed_when_the_next_is_committed(tmp_path: Path) -> None:
    assert ranks("slow_rank", 2, tmp_path) == [[["step-00000002.unfinished"], []]] * 2


def test_what_the_others_had_written_is_damaged(tmp_path: Path) -> None:
    """All of it is in memory."""
    ranks("die_before_the_parts_are_written", 2, tmp_path, 1)
    (partial,) = (tmp_path / "run").glob("*.partial-*")
    os.truncate(partial / "__0_0.distcp", 10)
    for result in ranks("resume", 2, tmp_path, 2):
        assert (result["step"], result["steps"], result["problems"]) == (2, [1, 2], [])


def test_one_process_alone_completes_what_the_others_had_written(tmp_path: Path) -> None:
    ranks("die_before_the_parts_are_written", 2, tmp_path, 1)
    for path in (tmp_path / "memory").rglob("rank-0.*"):  # on the host that died
        path.unlink()
    result = run("tests.replication.bodies:resume_alone", str(tmp_path), 2)
    assert (result["step"], result["problems"]) == (2, [])


def test_what_the_run_has_turned_back_from_does_not_return(tmp_path: Path) -> None:
    ranks("turn_back_and_die", 2, tmp_path)
    assert {_step_of(path) for path in (tmp_path / "memory").rglob("rank-1.?")} == {2, 3}
    for result in ranks("resume", 2, tmp_path, 1):
        assert (result["step"], result["steps"], result["problems"]) == (2, [1, 2], [])


def test_the_newest_is_damaged_on_the_disk_and_in_memory(tmp_path: Path) -> None:
    """The one before it, which only memory has, is next."""
    ranks("save_and_die", 2, tmp_path, 3)
    shutil.rmtree(checkpoint(tmp_path, 2))
    flip(checkpoint(tmp_path, 3) / "__1_0.distcp")
    damage(max((tmp_path / "memory").rglob("rank-1.?"), key=_step_of))
    results = ranks("resume", 2, tmp_path, 2)
    for result in results:
        assert (result["step"], result["steps"], result["problems"]) == (2, [1, 2, 3], [])
    said = results[0]["said"] + results[1]["said"]
    assert not any("step-00000003 was not whole" in text for text in said), said


@pytest.mark.parametrize(
    "what", ["bytes", *(pytest.param(what, marks=pytest.mark.long) for what in ("header", "missing"))]
)
def test_a_replica_that_is_damaged_is_not_used(what: str, tmp_path: Path) -> None:
    ranks("save_and_die", 2, tmp_path, 3)
    shutil.rmtree(checkpoint(tmp_path, 3))
    newest = max((tmp_path / "memory").rglob("rank-1.?"), key=_step_of)
    header = newest.with_name(newest.name + ".json")
    if what == "bytes":
        damage(newest)
    elif what == "header":
        flip(header)
    else:
        header.unlink()
    results = ranks("resume", 2, tmp_path, 2)
    for result in results:
        assert (result["step"], result["steps"], result["problems"]) == (2, [1, 2], [])
    expected = "do not match the hash in its header" if what == "bytes" else "memory holds only a part of it"
    said = results[0]["said"] + results[1]["said"]  # one of them speaks for the host
    assert any(expected in text for text in said), said
    assert not [name for name in os.listdir(tmp_path / "run") if "partial" in name or "removing" in name]


def damage(replica: Path) -> None:
    """Among its first bytes: the file is longer than what is used of it."""
    with open(replica, "r+b") as file:
        file.seek(100)
        byte = file.read(1)[0]
        file.seek(100)
        file.write(bytes([byte ^ 1]))


def _step_of(path: Path) -> int:
    header = read_header(str(path))
    assert header is not None
    return header.spec.step


def test_a_newer_whole_save_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    """After two runs, of which the second has fewer ranks, nothing of the first is in memory."""
    ranks("save_and_die", 3, tmp_path, 2)
    assert len(memory_of(tmp_path)) == 12
    next((tmp_path / "memory").rglob("rank-2.0.json")).unlink()  # as if the rank had been killed while it arrived
    ranks("save_and_die", 2, tmp_path, 2)
    assert memory_of(tmp_path) == [
        name for rank in (0, 1) for slot in (0, 1) for name in (f"rank-{rank}.{slot}", f"rank-{rank}.{slot}.json")
    ]
    shutil.rmtree(tmp_path / "run")
    assert [result["step"] for result in ranks("resume", 2, tmp_path, 2)] == [2, 2]


def test_what_cannot_be_restored_now_stays_in_memory(small_disk: Path, tmp_path: Path) -> None:
    """A job of fewer ranks has nobody who keeps rank 2's replica. It does not begin from an older step, or from nothing."""
    ranks("save_and_die", 3, tmp_path, 2)
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").symlink_to(small_disk)
    before = memory_of(tmp_path)
    for error in ranks("cannot_resume", 2, tmp_path):
        assert "step 2 is in the partners' memory, and could not be written" in error
        assert "No space left" in error
    assert memory_of(tmp_path) == before
    (tmp_path / "run").unlink()
    for result in ranks("resume", 2, tmp_path, 2):
        assert (result["step"], result["problems"]) == (2, [])


def test_the_next_run_keeps_what_is_whole_in_memory_until_it_has_a_newer_one(tmp_path: Path) -> None:
    ranks("save_and_die", 2, tmp_path, 2)
    headers = [read_header(str(path)) for path in (tmp_path / "memory").rglob("rank-0.?")]
    newest = max((header.spec for header in headers if header is not None), key=lambda spec: spec.step)
    assert ranks("whole_when_opened", 2, tmp_path) == [newest.save_id] * 2


def test_bodies_are_of_another_step() -> None:
    """Else the comparisons above would prove nothing."""
    assert bodies.differences(
        bodies.whole_state(bodies.build("plain", 1)), bodies.whole_state(bodies.build("plain", 2))
    )
