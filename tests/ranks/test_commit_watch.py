"""How a save ends on a rank that did not commit it, over torch's in-memory store."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from stager.ranks import commit_watch, keys
from stager.ranks.commit_watch import CommitWatch
from stager.ranks.messages import EveryPartWritten, NewestStep, SaveCommitted
from stager.ranks.rank_group import RankGroup
from stager.ranks.rendezvous import Rendezvous
from stager.workers import long_wait
from stager.workers.checkpoint.commit.commit import Committed, commit_recorded, partial_path
from stager.workers.checkpoint.directory.run_directory import CheckpointInfo
from stager.workers.checkpoint.documents.receipt import receipt_name
from stager.workers.checkpoint.write.save_spec import SaveSpec
from stager.workers.checkpoint.write.write_task import record_name
from stager.workers.errors import ClosedError, RankFailedError, StorageError


class _NoPool:
    """Whose workers are gone."""

    def submit(self, *_: Any) -> Future[Any]:
        raise ClosedError("no pool")


class _Committer:
    """Whose workers are asked to commit, and do."""

    def __init__(self, committed: Committed) -> None:
        self.committed = committed
        self.num_asked = 0

    def submit(self, task: object, spec: SaveSpec) -> Future[Any]:
        assert task is commit_recorded
        self.num_asked += 1
        with suppress(FileNotFoundError):  # another one was first
            os.rename(partial_path(spec), self.committed.info.path)
        done: Future[Any] = Future()
        done.set_result(self.committed)
        return done


class _Gone(dist.Store):
    """The process that serves it is gone."""

    def _refuse(self, *_: Any) -> Any:
        raise RuntimeError("Connection reset by peer")

    set = get = add = check = _refuse


class Ranks:
    """Of a group, in this process: those that are alive."""

    def __init__(
        self,
        num_ranks: int,
        timeout_secs: float,
        store: dist.Store | None = None,
        *,
        look_secs: float = 0.05,
        turn_secs: float = 0.4,
    ) -> None:
        store = store or dist.HashStore()
        self.num_ranks = num_ranks
        self.groups = [
            RankGroup(
                rank,
                num_ranks,
                Rendezvous(store, "test", num_ranks),
                timeout_secs,
                "nonce",
                look_secs=look_secs,
                turn_secs=turn_secs,
            )
            for rank in range(num_ranks)
        ]
        self.all = [CommitWatch(group, _NoPool()) for group in self.groups]

    def expect(self, spec: SaveSpec, ranks: Iterable[int]) -> list[Future[Committed]]:
        """The parts of these ranks are written. How the save ends on each."""
        ends: list[Future[Committed]] = []
        for rank in ranks:
            ends.append(Future())
            own = replace(spec, rank=rank, num_ranks=self.num_ranks)
            self.all[rank].expect(own, ends[-1].set_result, ends[-1].set_exception)
        return ends

    def close(self) -> None:
        for group, one in zip(self.groups, self.all, strict=True):
            one.close(ClosedError("the test is over"))
            group.close()


class Directory:
    """What ranks find when they look at the directory of a save."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    def list_by(self, listdir: Callable[[str], list[str]]) -> None:
        self._monkeypatch.setattr(commit_watch, "partial_file_names", lambda spec: listdir(partial_path(spec)))

    def commit_by(self, already_committed: Callable[[SaveSpec], Committed | None]) -> None:
        self._monkeypatch.setattr(commit_watch, "already_committed", already_committed)


@pytest.fixture
def directory(monkeypatch: pytest.MonkeyPatch) -> Directory:
    return Directory(monkeypatch)


@pytest.fixture
def make_ranks() -> Iterator[Callable[..., Ranks]]:
    """Ranks whose turns are short."""
    made: list[Ranks] = []

    def make(*args: Any, **secs: float) -> Ranks:
        made.append(Ranks(*args, **secs))
        return made[-1]

    yield make
    for ranks in made:
        ranks.close()


@pytest.fixture
def ranks() -> Iterator[list[CommitWatch]]:
    both = Ranks(2, 5.0)
    yield both.all
    both.close()


def _spec(directory: Path, save_id: str = "ab") -> SaveSpec:
    return SaveSpec(str(directory), 3, save_id, "dcp", 1, True, 1.0, "0", "0", rank=0, num_ranks=2)


def _written(directory: Path, ranks: Iterable[int]) -> SaveSpec:
    """Their receipts are there."""
    spec = _spec(directory)
    partial = Path(partial_path(spec))
    partial.mkdir()
    for rank in ranks:
        (partial / receipt_name(rank, 0, 1)).touch()
    return spec


def _end(one: CommitWatch, spec: SaveSpec) -> Committed:
    ended: Future[Committed] = Future()
    one.expect(spec, ended.set_result, ended.set_exception)
    return ended.result(20)


def _committed(directory: Path) -> Committed:
    info = CheckpointInfo(3, str(directory / "step-00000003"), 10, 1.0, "ab", 1, 0, "dcp")
    return Committed(info, 1.0, 2.0, 77)


def test_a_checkpoint_that_was_removed_before_this_rank_looked_was_committed(
    ranks: list[CommitWatch], tmp_path: Path
) -> None:
    info = CheckpointInfo(3, "/elsewhere/step-00000003", 10, 1.0, "ab", 1, 0, "dcp")
    ranks[1].messages.post_committed(Committed(info, 1.0, 2.0, 77))
    end = _end(ranks[0], _spec(tmp_path))
    assert end.info.path == str(tmp_path / "step-00000003")
    assert (end.info.nbytes, end.pid) == (10, 77)


def test_a_directory_that_cannot_be_read_now_fails_no_save(
    ranks: list[CommitWatch], tmp_path: Path, directory: Directory
) -> None:
    def refuse(_: SaveSpec) -> None:
        raise StorageError(errno.EIO, "cannot read", str(tmp_path))

    directory.commit_by(refuse)
    ranks[1].messages.post_failed("ab", ValueError("mine"))
    with pytest.raises(RankFailedError, match="the save of step 3 failed on rank 1: ValueError: mine"):
        _end(ranks[0], _spec(tmp_path))


class _Heard(logging.Handler):
    """Keeps the first message with these words, and sets an event."""

    def __init__(self, words: str) -> None:
        super().__init__()
        self.words, self.message, self.event = words, "", threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        if self.words in record.getMessage():
            assert not self.message, "told twice"
            self.message = record.getMessage()
            self.event.set()


def test_a_rank_that_does_not_call_save_is_named_before_the_deadline(
    make_ranks: Callable[..., Ranks], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. Ranks 1 and 3 of 4 write their parts. 2. The first of them says who did not begin. 3. The others come."""
    monkeypatch.setattr(long_wait, "ADVICE_SECS", 0.0)
    heard = _Heard("every rank has to call save()")
    logging.getLogger("stager").addHandler(heard)
    try:
        spec = _written(tmp_path, [1, 3])
        for rank in (1, 3):
            Path(partial_path(spec), record_name(rank)).touch()
        ranks = make_ranks(4, 60.0)
        ends = ranks.expect(spec, [1, 3])  # 1.
        assert heard.event.wait(60)  # 2.
        ranks.all[0].messages.post_committed(_committed(tmp_path))  # 3.
        for end in ends:
            end.result(20)
    finally:
        logging.getLogger("stager").removeHandler(heard)
    shutil.rmtree(partial_path(spec))
    assert heard.message.startswith("the save of step 3 waits for its part of rank 0, 2, which did not begin it")


# -- who looks: see NOTE [ Who looks at the directory ] ------------------------------------------------------------


@pytest.mark.parametrize("dead", [0, 1, 3])
def test_a_rank_that_does_not_come_is_named_on_all_others(
    dead: int, make_ranks: Callable[..., Ranks], tmp_path: Path
) -> None:
    """Rank 0 says it; rank 1 does, when it is rank 0 that is dead. The store lives on elsewhere."""
    ranks, alive = make_ranks(4, 0.3), [rank for rank in range(4) if rank != dead]
    spec = _written(tmp_path, alive)
    for end in ranks.expect(spec, alive):
        error = end.exception(60)
        assert isinstance(error, RankFailedError) and error.ranks == (dead,)
        assert f"within 0.3 s (ranks.timeout_secs): rank {dead} did not finish its part" in str(error)
    assert not Path(partial_path(spec)).exists()


def test_ranks_that_would_speak_for_rank_0_may_be_dead_too(make_ranks: Callable[..., Ranks], tmp_path: Path) -> None:
    ranks = make_ranks(6, 0.3)
    for end in ranks.expect(_written(tmp_path, [4, 5]), [4, 5]):
        error = end.exception(60)
        assert isinstance(error, RankFailedError) and error.ranks == (0, 1, 2, 3)


def test_who_finds_the_directory_removed_says_what_the_one_who_removed_it_has_said(
    make_ranks: Callable[..., Ranks], tmp_path: Path, directory: Directory
) -> None:
    """1. Rank 1 sees no note. 2. Rank 0 posts one, and removes the directory. 3. Rank 1 looks for the directory."""
    ranks = make_ranks(3, 0.3, look_secs=60.0)  # they look only at the deadline
    spec = _written(tmp_path, [0, 1])

    def listdir(path: str) -> list[str]:
        ranks.all[0].messages.post_failure(spec.save_id, "was given up", [2])
        raise FileNotFoundError(path)

    directory.list_by(listdir)
    (end,) = ranks.expect(spec, [1])
    error = end.exception(60)
    assert isinstance(error, RankFailedError)
    assert error.ranks == (2,)
    assert "was given up" in str(error)


def test_one_rank_lists_the_directory_for_all_at_the_deadline(
    make_ranks: Callable[..., Ranks], tmp_path: Path, directory: Directory
) -> None:
    """None has a turn to look before, and rank 0 is the first whose deadline it is."""
    listed: list[str] = []

    def listdir(path: str) -> list[str]:
        listed.append(threading.current_thread().name)
        return os.listdir(path)

    ranks = make_ranks(8, 0.3, look_secs=60.0, turn_secs=60.0)
    directory.list_by(listdir)
    ends = ranks.expect(_written(tmp_path, range(7)), range(7))
    assert {str(end.exception(60)) for end in ends} == {str(ends[0].exception(0))}
    assert len(listed) == 1


def test_a_commit_that_nobody_posts_is_found_posted_and_known_to_all(
    make_ranks: Callable[..., Ranks], tmp_path: Path, directory: Directory
) -> None:
    """Rank 0 committed, and died before it said so."""
    directory.commit_by(lambda _: _committed(tmp_path))
    ranks = make_ranks(3, 60.0)
    ends = ranks.expect(_spec(tmp_path), [1, 2])
    assert [end.result(20).info.save_id for end in ends] == ["ab", "ab"]
    group = ranks.groups[2]
    assert group.read(keys.NEWEST) == NewestStep(3)
    assert group.read(keys.save_end("ab")) == SaveCommitted(_committed(tmp_path))


@pytest.mark.parametrize("has_manifest", [False, True])
@pytest.mark.parametrize("alive", [[0, 1], [1, 2]], ids=["rank 0 lives", "rank 0 is dead"])
def test_a_save_that_only_has_to_be_committed_is_committed_by_who_looks(
    alive: list[int], has_manifest: bool, make_ranks: Callable[..., Ranks], tmp_path: Path
) -> None:
    """Its worker was killed when it had every receipt, or while it removed them."""
    ranks = make_ranks(3, 60.0)
    spec = _written(tmp_path, range(1 if has_manifest else 0, 3))
    if has_manifest:
        Path(partial_path(spec), "manifest.json").touch()
    committers = [_Committer(_committed(tmp_path)) for _ in range(3)]
    for one, committer in zip(ranks.all, committers, strict=True):
        one._pool = committer
    assert [end.result(20).pid for end in ranks.expect(spec, alive)] == [77, 77]
    assert sum(committer.num_asked for committer in committers) >= 1


def test_few_ranks_help_to_commit(make_ranks: Callable[..., Ranks]) -> None:
    messages = [one.messages for one in make_ranks(8, 60.0).all]
    assert [one.claims_commit("ab") for one in messages] == [True] * 3 + [False] * 5


@pytest.mark.parametrize("alive", [[0, 1], [1, 2]], ids=["rank 0 lives", "rank 0 is dead"])
def test_what_nobody_can_commit_fails_after_twice_the_time(
    alive: list[int], make_ranks: Callable[..., Ranks], tmp_path: Path
) -> None:
    """Every part is there: whoever sees it says so, and all wait once more."""
    ranks = make_ranks(3, 0.3)
    spec = _written(tmp_path, range(3))
    for end in ranks.expect(spec, alive):
        error = end.exception(60)
        assert isinstance(error, RankFailedError) and error.ranks == ()
        assert "nobody committed it" in str(error)
    assert ranks.groups[2].read(keys.every_part("ab")) == EveryPartWritten()
    assert not Path(partial_path(spec)).exists()


def test_the_removal_of_receipts_is_not_taken_for_missing_parts_at_the_deadline(
    make_ranks: Callable[..., Ranks], tmp_path: Path
) -> None:
    """1. The committer removes receipts; 2. the deadline passes; 3. it renames."""
    ranks = make_ranks(2, 0.2)
    spec = _written(tmp_path, [1])
    Path(partial_path(spec), "manifest.json").touch()
    (end,) = ranks.expect(spec, [0])
    assert ranks.groups[1].rendezvous.wait(keys.every_part("ab"), 20) is not None
    done = _committed(tmp_path)
    os.rename(partial_path(spec), done.info.path)
    ranks.all[1].messages.post_committed(done)
    assert end.result(20).pid == 77


def test_without_the_store_each_rank_looks_for_itself(
    make_ranks: Callable[..., Ranks], tmp_path: Path, directory: Directory
) -> None:
    committed = threading.Event()
    directory.commit_by(lambda _: _committed(tmp_path) if committed.is_set() else None)
    ranks = make_ranks(500, 60.0, _Gone(), turn_secs=60.0)  # nobody is waited for
    ends = ranks.expect(_spec(tmp_path), [200, 499])
    committed.set()
    assert [end.result(20).pid for end in ends] == [77, 77]


def test_without_the_store_a_rank_that_is_missing_is_named_by_who_sees_it_first(
    make_ranks: Callable[..., Ranks], tmp_path: Path
) -> None:
    ranks = make_ranks(3, 0.3, _Gone(), turn_secs=60.0)
    spec = _written(tmp_path, [0, 2])
    (first,) = ranks.expect(spec, [2])
    error = first.exception(60)
    assert isinstance(error, RankFailedError) and error.ranks == (1,)
    (second,) = ranks.expect(spec, [0])
    assert "another rank gave the save up, and removed its directory" in str(second.exception(60))


def test_who_reads_that_a_save_failed_sees_to_it_that_it_cannot_be_committed(
    make_ranks: Callable[..., Ranks], tmp_path: Path
) -> None:
    """The rank that posted it died before it had removed what was there."""
    ranks = make_ranks(2, 60.0)
    spec = _written(tmp_path, [0])
    ranks.all[1].messages.post_failed("ab", ValueError("mine"))
    (end,) = ranks.expect(spec, [0])
    assert "failed on rank 1: ValueError: mine" in str(end.exception(20))
    assert not Path(partial_path(spec)).exists()
