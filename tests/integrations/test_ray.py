"""Ray Train: what it registers is committed, whoever is killed meanwhile. docs/integrations/ray.md."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stager import ArgumentError, ConfigError, UsageError, verify
from tests.faults import Faults
from tests.integrations.training import Training, final, page_script, resumes_bit_equal
from tests.states import same

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray warns of its own code

pytest.importorskip("ray.train", reason="pip install 'stager[ray]'")

import ray.train
from ray.train import Checkpoint

from stager.integrations.ray import RayTrainCheckpointer, committed

CONFIG: dict[str, Any] = {"workers": {"count": 1}, "persistence": {"fsync": False}, "ranks": {"together": False}}


class Trainer:
    """Stands in for Ray around a training function: reports are uploaded in threads, and registered in their order."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rank = 0
        self.registered: list[tuple[dict[str, Any], Any]] = []
        self.uploads: list[Future[Any]] = []
        self.preemption: Any = None
        self.filesystem = Checkpoint(str(directory)).filesystem
        self._directory = directory
        self._threads = ThreadPoolExecutor(1)
        for name in ("get_context", "get_checkpoint", "report", "get_preemption_info"):
            monkeypatch.setattr(ray.train, name, getattr(self, f"_{name}"))

    def _get_context(self) -> Any:
        storage = SimpleNamespace(storage_filesystem=self.filesystem, experiment_fs_path=str(self._directory))
        return SimpleNamespace(get_world_rank=lambda: self.rank, get_storage=lambda: storage)

    def _get_checkpoint(self) -> Any:
        return next((checkpoint for _, checkpoint in reversed(self.registered) if checkpoint is not None), None)

    def _get_preemption_info(self) -> Any:
        return self.preemption

    def _report(
        self, metrics: dict[str, Any], checkpoint: Any = None, checkpoint_dir_name: str = "", **options: Any
    ) -> None:
        if checkpoint is None:
            self.registered.append((metrics, None))
            return
        assert options["checkpoint_upload_mode"] is ray.train.CheckpointUploadMode.ASYNC
        assert options["delete_local_checkpoint_after_upload"] is False

        def upload() -> None:
            self.registered.append((metrics, options["checkpoint_upload_fn"](checkpoint, checkpoint_dir_name)))

        self.uploads.append(self._threads.submit(upload))

    def end(self) -> None:
        self._threads.shutdown()


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Trainer]:
    (tmp_path / "run").mkdir()
    trainer = Trainer(tmp_path / "run", monkeypatch)
    yield trainer
    trainer.end()


def test_a_checkpoint_is_registered_when_it_is_committed_and_not_before(
    trainer: Trainer, tmp_path: Path, faults: Faults
) -> None:
    hold = faults.hold("commit.begin")
    state = {"weights": torch.arange(4.0)}
    with hold, RayTrainCheckpointer(CONFIG) as checkpointer:
        assert checkpointer.load(into=state) is None
        checkpointer.report({"loss": 0.5}, state, step=3, files={"note.txt": b"mine"})
        hold.wait()
        assert not trainer.registered
        hold.release()
        trainer.uploads[0].result()
        state["weights"].zero_()
        loaded = checkpointer.load(into=state)
        assert loaded is not None and loaded.step == 3 and loaded.files["note.txt"] == b"mine"
        assert state["weights"].tolist() == [0, 1, 2, 3]
    ((metrics, checkpoint),) = trainer.registered
    assert metrics == {"loss": 0.5} and checkpoint.path == str(tmp_path / "run/checkpoint_00000003")
    assert verify(checkpoint.path).ok


def test_steps_rise_also_in_the_attempt_that_resumes(trainer: Trainer) -> None:
    state = {"weights": torch.zeros(2)}
    with RayTrainCheckpointer(CONFIG) as checkpointer:
        checkpointer.report({}, state, step=4)
        with pytest.raises(ArgumentError, match=r"step is 4, and a checkpoint of step 4 was reported"):
            checkpointer.report({}, state, step=4)
    trainer.uploads[0].result()
    with RayTrainCheckpointer(CONFIG) as checkpointer:
        with pytest.raises(ArgumentError, match=r"step is 2, and a checkpoint of step 4 was reported"):
            checkpointer.report({}, state, step=2)


def test_a_checkpoint_that_was_lost_before_it_was_registered_is_replaced(trainer: Trainer, tmp_path: Path) -> None:
    state = {"weights": torch.zeros(2)}
    for value in (1.0, 2.0):
        state["weights"].fill_(value)
        trainer.registered.clear()  # the controller has not heard of it
        with RayTrainCheckpointer(CONFIG) as checkpointer:
            checkpointer.report({}, state, step=4)
        trainer.uploads[-1].result()
    with RayTrainCheckpointer(CONFIG) as checkpointer:
        assert checkpointer.load(into=state) is not None
    assert state["weights"].tolist() == [2, 2]


def test_a_failed_save_fails_the_report(trainer: Trainer, faults: Faults) -> None:
    faults.arm("part.write", "errno ENOSPC")
    with RayTrainCheckpointer(CONFIG) as checkpointer:
        checkpointer.report({}, {"weights": torch.zeros(2)}, step=1)
        with pytest.raises(OSError, match="No space left"):
            trainer.uploads[0].result()
    assert not trainer.registered


def test_without_a_process_group_one_worker_saves_and_the_others_load(trainer: Trainer) -> None:
    state = {"weights": torch.ones(2)}
    with RayTrainCheckpointer(CONFIG) as first:
        first.report({}, state, step=1)
    trainer.uploads[0].result()
    trainer.rank = 1
    state["weights"].zero_()
    with RayTrainCheckpointer(CONFIG) as second:
        assert second.checkpointer is None
        second.guard(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]))
        loaded = second.load(into=state)
        assert loaded is not None and state["weights"].tolist() == [1, 1]
        assert second.report({"loss": 1.0}, state, step=2) is None
    assert trainer.registered[-1] == ({"loss": 1.0}, None)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_preemption_has_the_deadline_of_ray(trainer: Trainer, rank: int) -> None:
    trainer.rank = rank
    with RayTrainCheckpointer(CONFIG) as checkpointer:
        assert checkpointer.preemption() is None
        trainer.preemption = SimpleNamespace(deadline_ms=int(1000 * (time.time() + 3600)))
        preemption = checkpointer.preemption()
        assert preemption is not None and preemption.requested
        remaining = preemption.remaining_secs()
        assert remaining is not None and 0 < remaining <= 3600
        assert checkpointer.preemption() is preemption


def test_what_cannot_be_meant_is_refused(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="when_full is skip"):
        RayTrainCheckpointer({**CONFIG, "arena": {"when_full": "skip"}})
    trainer.filesystem = SimpleNamespace(type_name="s3")
    with pytest.raises(ConfigError, match="storage is of the kind 's3'"):
        RayTrainCheckpointer(CONFIG)
    monkeypatch.delattr(ray.train, "CheckpointUploadMode")
    with pytest.raises(UsageError, match="RAY_TRAIN_V2_ENABLED"):
        RayTrainCheckpointer(CONFIG)


def test_outside_of_a_training_function_it_is_refused() -> None:
    with pytest.raises(UsageError, match="outside of a training function"):
        RayTrainCheckpointer(CONFIG)


def test_the_upload_function_returns_what_was_committed(tmp_path: Path) -> None:
    done: Future[Any] = Future()
    done.set_result(SimpleNamespace(path=str(tmp_path / "there")))
    given = Checkpoint(str(tmp_path / "here"))
    handle: Any = SimpleNamespace(upload_completion=done)
    assert committed(handle)(given, "here").path == str(tmp_path / "there")


# -- the real one -----------------------------------------------------------------------------------------------------


@pytest.fixture
def environment() -> Iterator[tuple[tuple[str, str], ...]]:
    """What Ray leaves lies in a directory with a short name: it has sockets there."""
    directory = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}
    yield (("RAY_TMPDIR", directory), *quiet.items())
    shutil.rmtree(directory)


def script_that_waits(directory: Path) -> Path:
    """The script of the page, which notes where it begins, and waits after each report until Ray has registered it."""
    path = page_script("ray", directory)
    source = path.read_text()
    begin, report = "        for step in range(resumed", "state, step=step)\n"
    assert source.count(begin) == source.count(report) == 1
    note = '        open(f"{config[\'out\']}/began-{rank}-{resumed.step if resumed else 0}", "w").close()\n'
    source = source.replace(begin, note + begin)
    source = source.replace(report, f"{report}                ray.train.get_all_reported_checkpoints()\n")
    path.write_text(source)
    return path


@pytest.mark.long
@pytest.mark.parametrize(("point", "num_workers"), [("save.copied", 1), ("save.handed-over", 2), ("part.written", 2)])
def test_a_worker_that_is_killed_in_the_middle_of_a_save_is_restarted_by_ray_and_resumes_bit_equal(
    tmp_path: Path, faults: Faults, environment: tuple[tuple[str, str], ...], point: str, num_workers: int
) -> None:
    """At a worker's point: first stager's worker is killed, and replaced; a save later, Ray's is."""
    training = Training(script_that_waits(tmp_path), environment=environment)
    training.run(tmp_path / "whole", num_workers)
    if point == "part.written":
        faults.arm(point, "kill after=1")
        point = "save.handed-over"
    faults.arm(point, "kill after=3")
    training.run(tmp_path / "broken", num_workers)
    assert faults.fired(point) and faults.fired("part.written")
    assert same(final(tmp_path / "whole"), final(tmp_path / "broken"))
    begun = {path.name for path in (tmp_path / "broken").glob("began-*")}
    assert begun == {f"began-{rank}-{step}" for rank in range(num_workers) for step in (0, 12)}
    kept = sorted(path.name for path in (tmp_path / "broken/run").glob("checkpoint_0*"))
    assert kept == ["checkpoint_00000020", "checkpoint_00000024"]


@pytest.mark.long
def test_a_new_job_of_the_same_name_goes_on_bit_equal(
    tmp_path: Path, faults: Faults, environment: tuple[tuple[str, str], ...]
) -> None:
    path = script_that_waits(tmp_path)
    path.write_text(path.read_text().replace("max_failures=1", "max_failures=0"))
    resumes_bit_equal(Training(path, environment=environment), tmp_path, faults, "save.copied", 3)
    assert (tmp_path / "broken/began-0-12").exists()
