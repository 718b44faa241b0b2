"""Strangers: what somebody else has put into a directory of ours costs no checkpoint, is not lost, and is not followed."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import pytest
import torch

from stager import Checkpointer, RecoverOutcome, UsageError, recover, verify
from stager.operations import prune
from stager.workers.checkpoint.commit.commit import partial_path
from stager.workers.checkpoint.commit.persist import persist_part
from stager.workers.checkpoint.directory.run_directory import is_checkpoint_directory
from stager.workers.checkpoint.documents.own_names import is_own
from tests.cli.conftest import Outcome
from tests.persistence.tasks import load, make_task, save
from tests.states import same

STATE = {"x": torch.arange(9.0), "o": 2}

STRANGERS: dict[str, Callable[[Path], object]] = {
    ".DS_Store": Path.touch,
    "config.json": lambda path: path.write_text("{}"),
    "README.md": lambda path: path.write_text("the best one"),
    "eval": lambda path: (path / "deep").mkdir(parents=True),
    "__0_0.distcp.d": Path.mkdir,
    "latest": lambda path: path.symlink_to("nowhere"),
    "data": lambda path: path.symlink_to(path.parents[2], target_is_directory=True),
    "pipe": os.mkfifo,
    ".stager.lock": Path.touch,  # an earlier version put it there, when the checkpoint was opened as a run
    "receipt-0-0-of-1.json": Path.mkdir,  # a directory: stager makes none
}


def everything(path: Path) -> list[str]:
    """Every path below ``path``; links are not followed."""
    names = (os.path.join(base, name) for base, *names in os.walk(path) for name in chain(*names))
    return sorted(os.path.relpath(name, path) for name in names)


def put(into: Path, names: list[str] | None = None) -> list[str]:
    for name in names or STRANGERS:
        STRANGERS[name](into / name)
    return sorted(names or STRANGERS)


@pytest.mark.parametrize("name", STRANGERS)
def test_stranger_beside_the_data_is_noted_and_the_checkpoint_loads(run_dir: Path, name: str) -> None:
    save(run_dir, {"x": torch.zeros(9), "o": 1}, step=1, fsync=False)
    newest = Path(save(run_dir, STATE, step=2, fsync=False).path)
    put(newest, [name])
    with Checkpointer(run_dir, read_only=True) as ckpt:
        latest = ckpt.latest()
        assert latest is not None and latest.step == 2 and ckpt.skipped == []
        loaded = ckpt.load()
        assert loaded is not None and loaded.step == 2 and same(loaded.state, STATE)
        assert ckpt.load(2) is not None
    report = verify(newest)
    assert report.ok and report.strangers == (name,)
    strict = verify(newest, strict=True)
    assert not strict.ok and strict.problems == (f"{newest / name}: does not belong to this checkpoint",)


def test_command_line_notes_strangers_and_with_strict_says_no(run_dir: Path) -> None:
    put(Path(save(run_dir, STATE, step=2, fsync=False).path), ["config.json", "eval"])
    outcome = Outcome("verify", run_dir)
    assert outcome.code == 0 and "note: not of this checkpoint: config.json, eval" in outcome.out
    assert Outcome("verify", run_dir, "--json").json["checkpoints"][0]["strangers"] == ["config.json", "eval"]
    strict = Outcome("verify", run_dir, "--strict")
    assert strict.code == 1 and "2 problem(s)" in strict.out


def test_stranger_that_comes_or_goes_does_not_make_a_checkpoint_unverified(run_dir: Path) -> None:
    newest = Path(save(run_dir, STATE, step=2, fsync=False).path)
    with Checkpointer(run_dir, read_only=True) as ckpt:
        ckpt.latest()
        put(newest)
        assert ckpt._loader.knows_whole(str(newest))
        (newest / "config.json").unlink()
        assert ckpt._loader.knows_whole(str(newest))
        os.utime(newest / "manifest.json")
        assert not ckpt._loader.knows_whole(str(newest))


def test_stranger_in_a_partial_directory_goes_with_the_checkpoint(run_dir: Path) -> None:
    run_dir.mkdir()
    job = make_task(run_dir, STATE, step=3, num_parts=2, fsync=False)
    persist_part(job, 0)
    put(Path(partial_path(job.spec)))
    persist_part(job, 1)
    committed = run_dir / "step-00000003"
    assert set(STRANGERS) - {".stager.lock"} <= set(os.listdir(committed)) and verify(committed).ok
    assert os.listdir(run_dir) == ["step-00000003"]


def test_save_of_a_step_again_keeps_the_strangers_of_the_replaced_one(run_dir: Path) -> None:
    old = Path(save(run_dir, {"x": torch.zeros(9), "o": 1}, step=2, fsync=False).path)
    put(old)
    info = save(run_dir, STATE, step=2, fsync=False)
    assert same(load(info), STATE) and verify(info.path, strict=True).ok
    assert kept(run_dir, step=2) == sorted(set(STRANGERS) - {".stager.lock"})


def kept(run_dir: Path, step: int) -> list[str]:
    """What is in the only directory of strangers, with nothing of stager's among it."""
    (aside,) = run_dir.glob(f"step-{step:08d}.strangers-*")
    assert (aside / "eval" / "deep").is_dir() and (aside / "README.md").read_text() == "the best one"
    return sorted(os.listdir(aside))


def test_removal_by_retention_keeps_the_strangers_and_says_where(run_dir: Path) -> None:
    for step in (1, 2):
        save(run_dir, STATE, step=step, fsync=False)
    put(run_dir / "step-00000001")
    outside = everything(run_dir.parent)
    report = prune(run_dir, keep_latest=1)
    assert [(v.step, v.fate.value) for v in report.verdicts] == [(2, "kept"), (1, "removed")]
    (aside,) = run_dir.glob("*.strangers-*")
    assert str(aside) in report.verdicts[1].reason
    assert kept(run_dir, step=1) == sorted(set(STRANGERS) - {".stager.lock"})
    gone = {name for name in outside if name.startswith("run/step-00000001")}
    assert set(outside) - gone <= set(everything(run_dir.parent))  # no link was followed
    # They are no checkpoint, and nobody comes back to them.
    assert [v.step for v in prune(run_dir, keep_latest=1).verdicts] == [2]
    assert recover(run_dir).found == ()


def test_removal_without_strangers_leaves_nothing(run_dir: Path) -> None:
    for step in (1, 2):
        save(run_dir, STATE, step=step, fsync=False)
    prune(run_dir, keep_latest=1)
    assert os.listdir(run_dir) == ["step-00000002"]


@pytest.mark.parametrize("ending", ["partial-ab", "removing-ab", "unfinished-ab"])
def test_recover_keeps_strangers_of_what_it_removes(run_dir: Path, ending: str) -> None:
    save(run_dir, STATE, step=1, fsync=False)
    left = run_dir / f"step-00000007.{ending}"
    left.mkdir()
    (left / "__0_0.distcp").touch()
    put(left)
    (found,) = [found for found in recover(run_dir).found if found.name == left.name]
    assert found.outcome is RecoverOutcome.REMOVED
    assert kept(run_dir, step=7) == sorted(set(STRANGERS) - {".stager.lock"})
    assert recover(run_dir).found == ()


def test_recover_commits_a_partial_directory_with_strangers(run_dir: Path) -> None:
    path = Path(save(run_dir, STATE, step=3, fsync=False).path)
    save_id = save(run_dir, STATE, step=4, fsync=False).save_id
    (run_dir / "step-00000004").rename(run_dir / f"step-00000004.partial-{save_id}")
    put(run_dir / f"step-00000004.partial-{save_id}", ["README.md", "eval"])
    (found,) = recover(run_dir).found
    assert found.outcome is RecoverOutcome.COMMITTED
    assert verify(run_dir / "step-00000004").strangers == ("README.md", "eval") and verify(path, strict=True).ok


def test_strangers_in_the_run_directory_are_left_alone(run_dir: Path) -> None:
    for step in (1, 2):
        save(run_dir, STATE, step=step, fsync=False)
    put(run_dir, ["README.md", "config.json", ".DS_Store", "eval", "latest", "data"])
    (run_dir / "manifest.json").write_text('{"name": "a web page"}')
    (run_dir / "step-00000009").touch()  # a file
    (run_dir / "step-00000008").symlink_to("nowhere")
    (run_dir / "step-00000002 (copy)").mkdir()
    before = everything(run_dir)
    with Checkpointer(run_dir, {"persistence": {"fsync": False}, "retention": {"keep_latest": 2}}) as ckpt:
        loaded = ckpt.load()
        assert loaded is not None and loaded.step == 2 and same(loaded.state, STATE)
        ckpt.save(3, STATE).upload_completion.result()
    assert [info.step for info in ckpt.checkpoints()] == [2, 3]
    gone = {name for name in before if name.startswith("step-00000001")}
    assert set(before) - gone <= set(everything(run_dir))
    with pytest.raises(UsageError, match="one checkpoint"):
        prune(run_dir / "step-00000002", keep_latest=1)


def test_manifest_of_another_program_makes_no_checkpoint(tmp_path: Path) -> None:
    assert not is_checkpoint_directory(str(tmp_path))
    (tmp_path / "manifest.json").write_text("{}")
    assert not is_checkpoint_directory(str(tmp_path))
    moved = Path(save(tmp_path / "run", STATE, fsync=False).path).rename(tmp_path / "best")
    assert is_checkpoint_directory(str(moved))
    (moved / "manifest.json").write_bytes(b"X" + (moved / "manifest.json").read_bytes()[1:])  # damaged
    assert is_checkpoint_directory(str(moved))


@pytest.mark.parametrize("kind", ["dcp", "torch", "safetensors"])
def test_every_file_that_a_save_writes_has_a_name_of_ours(run_dir: Path, kind: str) -> None:
    """Or a removal would leave it: each file, at each moment of a save."""
    run_dir.mkdir()
    task = make_task(
        run_dir, STATE if kind != "safetensors" else {"x": STATE["x"]}, kind=kind, num_parts=2, fsync=False
    )
    persist_part(task, 0)
    names = set(os.listdir(partial_path(task.spec)))
    persist_part(task, 1)
    (committed,) = run_dir.iterdir()
    names.update(os.listdir(committed))
    assert len(names) >= 4 and all(map(is_own, names)), names
