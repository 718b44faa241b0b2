from __future__ import annotations

import os
from pathlib import Path

import pytest

from stager import Checkpointer
from stager.operations import recover
from stager.workers.checkpoint.commit.commit import partial_path
from stager.workers.checkpoint.commit.persist import persist_part
from stager.workers.checkpoint.storage.posix.run_lock import lock_directory
from stager.workers.errors import DirectoryInUseError
from tests.cli.conftest import Outcome
from tests.persistence.tasks import make_task
from tests.persistence.test_recover import stop_before_publishing, stop_before_renaming
from tests.retention.runs import everything_in, make_run, steps_of


def test_finishes_and_removes(run_dir: Path) -> None:
    make_run(run_dir, (1, 2))
    whole = [Path(partial_path(stop(run_dir, step=step).spec)).name for step, stop in _STOPS.items()]
    torn = make_task(run_dir, step=7)
    persist_part(torn, 0)
    (run_dir / "step-00000001").rename(run_dir / "step-00000001.removing-ab")
    before = everything_in(run_dir)
    dry = Outcome("recover", run_dir, "--dry-run")
    assert dry.code == 0 and everything_in(run_dir) == before
    assert f"would commit {whole[0]}: every part was written, only the commit was missing" in dry.out
    planned = Outcome("recover", run_dir, "--dry-run", "--json").json
    done = Outcome("recover", run_dir, "--json")
    assert done.code == 0
    assert done.json["found"] == planned["found"]
    assert [row["outcome"] for row in planned["found"]] == ["committed", "committed", "removed", "removed"]
    assert steps_of(run_dir) == [2, 5, 6]
    assert Outcome("recover", run_dir).out == f"nothing to recover in {run_dir}\n"


_STOPS = {5: stop_before_publishing, 6: stop_before_renaming}


@pytest.mark.remains
@pytest.mark.parametrize("options", [(), ("--dry-run",)])
def test_refuses_while_a_run_is_alive(run_dir: Path, options: tuple[str, ...]) -> None:
    make_run(run_dir, (1,))
    stop_before_publishing(run_dir, step=5)
    lock_fd = lock_directory(str(run_dir), 0)
    try:
        outcome = Outcome("recover", run_dir, *options)
    finally:
        os.close(lock_fd)
    assert outcome.code == 1 and f"trainer process {os.getpid()}" in outcome.err
    assert len(list(run_dir.glob("*.partial-*"))) == 1


def test_what_cannot_be_dealt_with_is_a_no(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(run_dir, (1,))
    stop_before_publishing(run_dir, step=5)
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", _eio)
        outcome = Outcome("recover", run_dir)
    assert outcome.code == 1 and outcome.out.startswith("left step-00000005.partial-")
    assert Outcome("recover", run_dir).out.startswith("committed step-00000005.partial-")


def _eio(*_: object, **__: object) -> None:
    raise OSError(5, "Input/output error")


def test_dry_run_makes_no_lock_file(run_dir: Path) -> None:
    run_dir.mkdir()
    assert Outcome("recover", run_dir, "--dry-run").code == 0
    assert os.listdir(run_dir) == []


def test_wrong_usage(saved_run: Path) -> None:
    assert Outcome("recover", saved_run / "step-00000001").code == 2
    outcome = Outcome("recover", saved_run / "none")
    assert outcome.code == 1 and "no such directory" in outcome.err


def test_dry_run_beside_ranks_that_share_the_lock_is_refused(tmp_path: Path) -> None:
    lock_fd = lock_directory(str(tmp_path), 0, shared=True)
    try:
        with pytest.raises(DirectoryInUseError):
            recover(tmp_path, dry_run=True)
    finally:
        os.close(lock_fd)


def test_run_that_this_process_has_open_is_named_by_the_line_that_opened_it(run_dir: Path) -> None:
    with Checkpointer(run_dir), pytest.raises(DirectoryInUseError, match=r"made at .*test_recover\.py:\d+; .*close"):
        recover(run_dir)
