"""What is linked, what is written, and that a file which checkpoints share is never written to."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from stager.workers.checkpoint.commit import persist
from stager.workers.checkpoint.directory.run_directory import read_checkpoint
from stager.workers.checkpoint.documents.names import checkpoint_name
from stager.workers.checkpoint.documents.receipt import Receipt
from stager.workers.checkpoint.maintenance.recover import RecoverOutcome, recover
from stager.workers.checkpoint.read.verify import verify_checkpoint
from stager.workers.checkpoint.storage.posix import file_sink
from stager.workers.checkpoint.storage.writing import Writing
from stager.workers.errors import StorageError
from tests.incremental.states import ADAPTER_FILE, FROZEN_FILES, frozen_and_adapter, save_incrementally, shared_files
from tests.persistence.tasks import Crash, failing_call, in_turn, load, make_task, run
from tests.states import same


def test_unchanged_files_are_linked_and_changed_ones_written(run_dir: Path) -> None:
    first = save_incrementally(run_dir, 1.0, 1, None)
    second = save_incrementally(run_dir, 2.0, 2, 1)
    assert shared_files(first.path, second.path) == list(FROZEN_FILES)
    assert (first.linked_bytes, second.linked_bytes) == (0, sum(_size(second.path, name) for name in FROZEN_FILES))
    for info, value in ((first, 1.0), (second, 2.0)):
        assert verify_checkpoint(info.path).ok and same(load(info), frozen_and_adapter(value))
    assert read_checkpoint(str(run_dir), 2)[1].header.generation == 1


def _size(directory: str, name: str) -> int:
    return (Path(directory) / name).stat().st_size


def test_nothing_changed_at_all(run_dir: Path) -> None:
    """Also the pickled objects are linked then."""
    first = save_incrementally(run_dir, 1.0, 1, None, num_parts=3)
    second = save_incrementally(run_dir, 1.0, 2, 1, num_parts=3)
    assert shared_files(first.path, second.path) == [*FROZEN_FILES, ADAPTER_FILE, "__0_objects.distcp"]
    assert same(load(second), frozen_and_adapter(1.0))


def test_each_is_whole_when_the_other_is_removed(run_dir: Path) -> None:
    save_incrementally(run_dir, 1.0, 1, None)
    infos = [save_incrementally(run_dir, float(step), step, step - 1) for step in (2, 3)]
    assert (Path(infos[1].path) / FROZEN_FILES[0]).stat().st_nlink == 3
    shutil.rmtree(run_dir / "step-00000001")
    shutil.rmtree(infos[0].path)
    assert (Path(infos[1].path) / FROZEN_FILES[0]).stat().st_nlink == 1
    assert verify_checkpoint(infos[1].path).ok and same(load(infos[1]), frozen_and_adapter(3.0))


def test_the_same_step_again_links_to_the_one_that_it_replaces(run_dir: Path) -> None:
    inode = (Path(save_incrementally(run_dir, 1.0, 1, None).path) / FROZEN_FILES[0]).stat().st_ino
    again = save_incrementally(run_dir, 2.0, 1, 1)
    stat = (Path(again.path) / FROZEN_FILES[0]).stat()
    assert (stat.st_ino, stat.st_nlink) == (inode, 1)
    assert verify_checkpoint(again.path).ok and same(load(again), frozen_and_adapter(2.0))


def test_another_dealing_of_the_work_links_as_well(run_dir: Path) -> None:
    """More workers than in the run before."""
    first = save_incrementally(run_dir, 1.0, 1, None, num_parts=1)
    second = save_incrementally(run_dir, 2.0, 2, 1, num_parts=5)
    assert shared_files(first.path, second.path) == list(FROZEN_FILES)


def test_every_nth_save_is_written_in_full(run_dir: Path) -> None:
    infos = [save_incrementally(run_dir, 1.0, 1, None)]
    infos += [save_incrementally(run_dir, 1.0, step, step - 1, full_every=3) for step in range(2, 8)]
    assert [bool(info.linked_bytes) for info in infos] == [False, True, True, False, True, True, False]


def _truncate(base: Path) -> None:
    for name in FROZEN_FILES:
        os.truncate(base / name, 100)


def _write_to(base: Path) -> None:
    """The same size, and one byte that is another: the time of it gives it away."""
    for name in FROZEN_FILES:
        data = bytearray((base / name).read_bytes())
        data[2000] ^= 1
        (base / name).write_bytes(data)
        os.utime(base / name, ns=(0, (base / "manifest.json").stat().st_mtime_ns + 1))


def _symlink(base: Path) -> None:
    for name in FROZEN_FILES:
        shutil.move(base / name, base.parent / f"elsewhere{name}")
        (base / name).symlink_to(base.parent / f"elsewhere{name}")


def _remove_files(base: Path) -> None:
    for name in FROZEN_FILES:
        (base / name).unlink()


def _damage_manifest(base: Path) -> None:
    data = (base / "manifest.json").read_bytes()
    (base / "manifest.json").write_bytes(data[:-9] + b"x" + data[-8:])


def _move_behind_link(base: Path) -> None:
    base.rename(base.parent / "elsewhere")
    base.symlink_to(base.parent / "elsewhere")


@pytest.mark.parametrize(
    "harm, words",
    [
        (shutil.rmtree, "cannot be opened"),
        (_truncate, "is damaged"),
        (_write_to, "is not the file that was committed"),
        (_symlink, "is damaged"),
        (_remove_files, "removed meanwhile"),
        (_damage_manifest, "the manifest of step-00000001 is damaged"),
        (lambda base: (base / "manifest.json").unlink(), "cannot be read"),
        (_move_behind_link, "cannot be opened"),
    ],
    ids=["removed", "truncated", "written to", "symlinks", "files removed", "manifest", "no manifest", "link"],
)
def test_base_that_is_not_what_was_committed_is_not_linked_to(
    run_dir: Path, harm: Callable[[Path], None], words: str
) -> None:
    harm(Path(save_incrementally(run_dir, 1.0, 1, None).path))
    job = make_task(run_dir, frozen_and_adapter(2.0), step=2, incremental=True, base_step=1)
    results = [persist.persist_part(job, part) for part in range(2)]
    assert any(words in result.note for result in results), [result.note for result in results]
    info, _ = read_checkpoint(str(run_dir), 2)
    assert all((Path(info.path) / name).stat().st_nlink == 1 for name in FROZEN_FILES)
    assert info.linked_bytes == 0
    assert verify_checkpoint(info.path).ok and same(load(info), frozen_and_adapter(2.0))


@pytest.mark.parametrize("code", [errno.EPERM, errno.EMLINK, errno.EXDEV, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def test_file_system_without_hard_links(run_dir: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    save_incrementally(run_dir, 1.0, 1, None)
    monkeypatch.setattr(os, "link", _refuse(code))
    job = make_task(run_dir, frozen_and_adapter(2.0), step=2, incremental=True, base_step=1, num_parts=1)
    result = persist.persist_part(job, 0)
    assert (
        result.note == f"written although unchanged: files of step-00000001 cannot be linked here ({os.strerror(code)})"
    )
    assert result.committed is not None and verify_checkpoint(result.committed.info.path).ok


def test_full_disk_while_linking_is_an_error_like_any_other(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_incrementally(run_dir, 1.0, 1, None)
    monkeypatch.setattr(os, "link", _refuse(errno.ENOSPC))
    job = make_task(run_dir, frozen_and_adapter(2.0), step=2, incremental=True, base_step=1)
    with pytest.raises(StorageError, match="cannot link; free space") as caught:
        persist.persist_part(job, 0)
    assert caught.value.errno == errno.ENOSPC
    persist.discard_partial(str(run_dir), checkpoint_name(2), job.spec.save_id)
    assert verify_checkpoint(run_dir / "step-00000001").ok


def _refuse(code: int) -> Callable[..., None]:
    def link(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    return link


@pytest.mark.parametrize("then", ["another worker", "the next run"])
def test_crash_at_each_system_call_harms_neither_base_nor_successor(tmp_path: Path, then: str) -> None:
    outcomes = set()

    def attempt(number: int) -> bool:
        run_dir = tmp_path / str(number)
        save_incrementally(run_dir, 1.0, 1, None, fsync=False)
        job = make_task(run_dir, frozen_and_adapter(2.0), step=2, incremental=True, base_step=1)
        with failing_call(number, Crash) as reached, suppress(Crash):
            run(job)
        if then == "another worker":  # does every part that has no answer again
            for part in range(job.spec.num_parts):
                persist.persist_part(job, part)
        found = recover(str(run_dir))
        outcomes.update(item.outcome for item in found)
        for step, value in ((1, 1.0), (2, 2.0)):
            if then == "the next run" and step == 2 and not (run_dir / "step-00000002").exists():
                continue
            assert verify_checkpoint(run_dir / f"step-{step:08d}").problems == ()
            if step == 2:
                assert same(load(read_checkpoint(str(run_dir), step)[0]), frozen_and_adapter(value))
        assert not list(run_dir.glob("*.partial-*"))
        shutil.rmtree(run_dir)
        return reached()

    assert in_turn(attempt) > 50
    assert outcomes == (set() if then == "another worker" else {RecoverOutcome.COMMITTED, RecoverOutcome.REMOVED})


@pytest.mark.parametrize("direct_io", [False, True])
def test_part_that_is_run_again_never_writes_to_what_it_linked(
    run_dir: Path, direct_io: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. a worker links, and dies before its receipt. 2. the base is not to be trusted now. 3. the part is run again."""
    base = Path(save_incrementally(run_dir, 1.0, 1, None).path)
    monkeypatch.setattr(file_sink, "_DIRECT_FROM_BYTES", 1)
    job = make_task(run_dir, frozen_and_adapter(2.0), step=2, incremental=True, base_step=1, num_parts=1)
    job = replace(job, writing=Writing(direct_io=direct_io))
    with monkeypatch.context() as patch:
        patch.setattr(Receipt, "to_bytes", _crash)
        with pytest.raises(Crash):
            persist.persist_part(job, 0)
    before = {name: ((base / name).read_bytes(), (base / name).stat().st_mtime_ns) for name in FROZEN_FILES}
    assert (base / FROZEN_FILES[0]).stat().st_nlink == 2
    manifest = (base / "manifest.json").rename(base / "aside")
    committed = persist.persist_part(job, 0).committed
    assert committed is not None and committed.info.linked_bytes == 0
    assert {name: ((base / name).read_bytes(), (base / name).stat().st_mtime_ns) for name in FROZEN_FILES} == before
    assert shared_files(str(base), committed.info.path) == []
    manifest.rename(base / "manifest.json")
    assert verify_checkpoint(base).ok and verify_checkpoint(committed.info.path).ok


def _crash(*_: object, **__: object) -> None:
    raise Crash


def test_one_damaged_file_is_found_in_every_checkpoint_that_shares_it(run_dir: Path) -> None:
    infos = [save_incrementally(run_dir, 1.0, 1, None)]
    infos += [save_incrementally(run_dir, float(step), step, step - 1) for step in (2, 3)]
    with open(Path(infos[0].path) / FROZEN_FILES[1], "r+b") as file:
        file.seek(3000)
        file.write(b"\xff")
    for info in infos:
        result = verify_checkpoint(info.path)
        assert len(result.problems) == 1 and f"{info.path}/{FROZEN_FILES[1]}" in result.problems[0]


def test_damage_that_nobody_looks_for_ends_with_the_next_save_in_full(run_dir: Path) -> None:
    infos = [save_incrementally(run_dir, 1.0, 1, None)]
    path = Path(infos[0].path) / FROZEN_FILES[0]
    before = path.stat()
    with open(path, "r+b") as file:
        file.seek(3000)
        file.write(b"\xff")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as if the disk had done it
    infos += [save_incrementally(run_dir, float(step), step, step - 1, full_every=3) for step in (2, 3, 4, 5)]
    assert [verify_checkpoint(info.path).ok for info in infos] == [False, False, False, True, True]
