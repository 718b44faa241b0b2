"""Which checkpoints go, and which stay whatever the rules say."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from stager.exporting.export import export_checkpoint
from stager.exporting.weights import export_weights
from stager.loading import loader
from stager.loading.loader import Loader
from stager.loading.place import Run
from stager.loading.restore import Restorer
from stager.workers.checkpoint.commit.persist import persist_part
from stager.workers.checkpoint.directory.protected import PROTECTED_NAME, change_protected_steps, read_protected
from stager.workers.checkpoint.directory.reading import reading
from stager.workers.checkpoint.directory.run_directory import committed_steps, partial_names, removing_names
from stager.workers.checkpoint.maintenance.retention import PruneFate, PruneReport, prune
from stager.workers.checkpoint.maintenance.retention_rules import RetentionRules
from stager.workers.checkpoint.read.verify import verify_checkpoint
from stager.workers.checkpoint.storage.posix import files
from stager.workers.errors import CorruptCheckpointError
from tests.incremental.states import save_incrementally
from tests.persistence.tasks import make_task, save
from tests.retention.runs import damage, everything_in, make_run, steps_of

STEPS = (10, 20, 30, 35, 40, 45)


@pytest.mark.parametrize(
    "rules, kept",
    [
        (RetentionRules(), [*STEPS]),
        (RetentionRules(keep_latest=1), [45]),
        (RetentionRules(keep_latest=3), [35, 40, 45]),
        (RetentionRules(keep_latest=9), [*STEPS]),
        (RetentionRules(keep_every=20), [20, 40, 45]),
        (RetentionRules(keep_every=7), [35, 45]),
        (RetentionRules(keep_latest=2, keep_every=10), [10, 20, 30, 40, 45]),
        (RetentionRules(keep_latest=1, protected=frozenset({10, 35, 99})), [10, 35, 45]),
        (RetentionRules(protected=frozenset({10})), [*STEPS]),
        (RetentionRules(keep_latest=1, full=False), [45]),
    ],
    ids=[
        "nothing",
        "latest-1",
        "latest-3",
        "latest-more-than-there-are",
        "every-20",
        "every-7",
        "latest-and-every",
        "latest-and-protected",
        "protected-alone",
        "latest-without-checking",
    ],
)
def test_rules(run_dir: Path, rules: RetentionRules, kept: list[int]) -> None:
    make_run(run_dir, STEPS)
    before = everything_in(run_dir)
    planned = prune(str(run_dir), rules, dry_run=True)
    assert everything_in(run_dir) == before
    report = prune(str(run_dir), rules)
    assert steps_of(run_dir) == kept == sorted(report.steps(PruneFate.KEPT))
    assert sorted(report.steps(PruneFate.REMOVED)) == sorted({*STEPS} - {*kept})
    assert (planned.verdicts, planned.freed_bytes, planned.dry_run) == (report.verdicts, report.freed_bytes, True)
    assert sorted(os.listdir(run_dir)) == [f"step-{step:08d}" for step in kept]


def fates(report: PruneReport) -> dict[int, str]:
    return {verdict.step: verdict.fate.value for verdict in report.verdicts}


def test_damaged_one_does_not_count_and_is_left(run_dir: Path) -> None:
    make_run(run_dir, STEPS)
    damage(run_dir, 45)
    report = prune(str(run_dir), RetentionRules(keep_latest=2))
    assert fates(report) == {45: "left", 40: "kept", 35: "kept", 30: "removed", 20: "removed", 10: "removed"}
    assert report.damaged == [45] and "hash does not match" in report.verdicts[0].reason
    assert committed_steps(str(run_dir)) == [45, 40, 35]


def test_last_valid_one_is_never_removed(run_dir: Path) -> None:
    """However old it is, and however many damaged ones are newer."""
    make_run(run_dir, STEPS)
    for step in STEPS[1:]:
        damage(run_dir, step)
    report = prune(str(run_dir), RetentionRules(keep_latest=1))
    assert fates(report) == {**dict.fromkeys(STEPS, "left"), 10: "kept"}
    assert verify_checkpoint(run_dir / "step-00000010").ok


def test_nothing_is_removed_when_nothing_valid_would_remain(run_dir: Path) -> None:
    make_run(run_dir, STEPS)
    for step in STEPS:
        (run_dir / f"step-{step:08d}" / "__0_0.distcp").unlink()
    report = prune(str(run_dir), RetentionRules(keep_latest=1))
    assert set(fates(report).values()) == {"left"} and report.damaged == [*STEPS[::-1]]
    assert len(committed_steps(str(run_dir))) == len(STEPS)


def test_renamed_one_does_not_count(run_dir: Path) -> None:
    make_run(run_dir, (1, 2, 3))
    (run_dir / "step-00000003").rename(run_dir / "step-00000009")
    report = prune(str(run_dir), RetentionRules(keep_latest=1))
    assert fates(report) == {9: "left", 2: "kept", 1: "removed"}
    assert report.verdicts[0].reason == "damaged: its manifest is of step 3: the directory was renamed"


def test_after_a_return_to_an_earlier_step_the_new_branch_stays(run_dir: Path) -> None:
    make_run(run_dir, (10, 20, 30, 12))
    prune(str(run_dir), RetentionRules(keep_latest=1))
    assert steps_of(run_dir) == [12, 30]
    make_run(run_dir, (13,))
    prune(str(run_dir), RetentionRules(keep_latest=1))
    assert steps_of(run_dir) == [13, 30]


def test_one_that_is_being_read_is_left_until_it_is_not(run_dir: Path) -> None:
    make_run(run_dir, (1, 2, 3))
    rules = RetentionRules(keep_latest=1)
    with reading(str(run_dir / "step-00000001")):
        report = prune(str(run_dir), rules)
        assert fates(report) == {3: "kept", 2: "removed", 1: "left"}
        assert report.verdicts[-1].reason == "it is being read"
        assert verify_checkpoint(run_dir / "step-00000001").ok
    assert fates(prune(str(run_dir), rules)) == {3: "kept", 1: "removed"}


def test_load_holds_what_it_reads(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a load of the oldest, everything but the newest is to go."""
    from stager.config import LoadingConfig

    make_run(run_dir, (1, 2, 3))
    reports = []

    class Slow(Restorer):
        def load(self) -> object:
            reports.append(prune(str(run_dir), RetentionRules(keep_latest=1)))
            return super().load()

    monkeypatch.setattr(loader, "Restorer", Slow)
    loaded = Loader(Run(str(run_dir)), LoadingConfig()).load(1, None, strict=True, allow_pickle=None)
    assert loaded is not None and (loaded.state["x"] == 1).all()
    assert fates(reports[0]) == {3: "kept", 2: "removed", 1: "left"}
    assert steps_of(run_dir) == [1, 3]


def test_one_that_is_removed_before_it_is_read_is_passed_over(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between verification and reading; the load falls back to the one before."""
    from stager.config import LoadingConfig

    make_run(run_dir, (1, 2))

    class Late(Restorer):
        def __init__(self, path: str, *args: object) -> None:
            super().__init__(path, *args)
            if path.endswith("2"):
                shutil.rmtree(path)

    monkeypatch.setattr(loader, "Restorer", Late)
    found = Loader(Run(str(run_dir)), LoadingConfig())
    loaded = found.load(None, None, strict=True, allow_pickle=None)
    assert loaded is not None and loaded.step == 1
    assert [item.name for item in found.skipped] == ["step-00000002"]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_save_of_a_step_again_and_a_removal_of_that_step(
    run_dir: Path, can_exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. a commit is about to give the new directory the old one's name. 2. retention wants to remove the old one.
    3. the commit goes on. Without the lock the new one could get a name that everybody removes."""
    make_run(run_dir, (1, 2, 3))
    reports = []
    exchange = files.exchange

    def slow(first: str, second: str) -> bool:
        reports.append(prune(str(run_dir), RetentionRules(keep_latest=1)))
        return can_exchange and exchange(first, second)

    monkeypatch.setattr(files, "exchange", slow)
    save(run_dir, {"x": torch.ones(50)}, step=1, num_parts=1)
    assert fates(reports[0]) == {3: "kept", 2: "removed", 1: "left"}
    assert steps_of(run_dir) == [1, 3]


@pytest.mark.parametrize(("export", "out"), [(export_checkpoint, "x.pt"), (export_weights, "x")])
def test_export_holds_what_it_reads(run_dir: Path, tmp_path: Path, export: Any, out: str) -> None:
    make_run(run_dir, (1, 2, 3))
    reports = []

    def progress(_: int) -> None:
        reports.append(prune(str(run_dir), RetentionRules(keep_latest=1)))

    export(run_dir / "step-00000001", tmp_path / out, progress=progress)
    assert fates(reports[0]) == {3: "kept", 2: "removed", 1: "left"}
    assert steps_of(run_dir) == [1, 3]


def test_partial_directories_are_not_touched(run_dir: Path) -> None:
    make_run(run_dir, (1, 2))
    job = make_task(run_dir, step=1, num_parts=2)
    persist_part(job, 0)
    prune(str(run_dir), RetentionRules(keep_latest=1))
    (partial,) = partial_names(str(run_dir))
    assert committed_steps(str(run_dir)) == [2]
    assert persist_part(job, 1).committed is not None
    assert steps_of(run_dir) == [1, 2] and not os.path.exists(run_dir / partial)


def test_protected_steps_stay_and_are_remembered(run_dir: Path) -> None:
    make_run(run_dir, (1, 2, 3))
    change_protected_steps(str(run_dir), lambda steps: steps | {1, 7})
    assert read_protected(str(run_dir)) == {1, 7}
    prune(str(run_dir), RetentionRules(keep_latest=1))
    assert steps_of(run_dir) == [1, 3]


@pytest.mark.parametrize("content", [b"", b"[1]", b"{}"])
def test_damaged_list_of_protected_steps_stops_everything(run_dir: Path, content: bytes) -> None:
    make_run(run_dir, (1, 2, 3))
    (run_dir / PROTECTED_NAME).write_bytes(content)
    with pytest.raises(CorruptCheckpointError, match=PROTECTED_NAME):
        prune(str(run_dir), RetentionRules(keep_latest=1))
    assert steps_of(run_dir) == [1, 2, 3]


def test_only_bytes_that_no_other_checkpoint_shares_count_as_freed(run_dir: Path) -> None:
    infos = [save_incrementally(run_dir, 1.0, 1, None)]
    infos += [save_incrementally(run_dir, float(step), step, step - 1) for step in (2, 3)]
    manifests = sum((Path(info.path) / "manifest.json").stat().st_size for info in infos[:2])
    shared = infos[1].linked_bytes
    expected = sum(info.nbytes - shared for info in infos[:2]) + manifests
    assert prune(str(run_dir), RetentionRules(keep_latest=1), dry_run=True).freed_bytes == expected
    assert prune(str(run_dir), RetentionRules(keep_latest=1)).freed_bytes == expected
    assert steps_of(run_dir) == [3]


def test_links_to_directories_elsewhere_are_not_followed(run_dir: Path, tmp_path: Path) -> None:
    """Neither where one has the name of a checkpoint, nor where it has that of one that is being removed."""
    make_run(run_dir, (1, 2, 3))
    elsewhere = tmp_path / "elsewhere"
    (run_dir / "step-00000001").rename(elsewhere)
    (run_dir / "step-00000001").symlink_to(elsewhere)
    (run_dir / "step-00000007.removing-ab").symlink_to(elsewhere)
    before = everything_in(elsewhere)[1:]
    planned = prune(str(run_dir), RetentionRules(keep_latest=1), dry_run=True)
    report = prune(str(run_dir), RetentionRules(keep_latest=1))
    assert fates(planned) == fates(report) == {3: "kept", 2: "removed", 1: "left"}
    assert "it is a symbolic link" in report.verdicts[-1].reason
    assert everything_in(elsewhere)[1:] == before and not removing_names(str(run_dir))


def test_no_directory_is_nothing_to_prune(run_dir: Path) -> None:
    assert prune(str(run_dir), RetentionRules(keep_latest=1)).verdicts == ()
