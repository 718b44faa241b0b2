"""Accelerate: what its state is with stager, whoever is killed meanwhile. docs/integrations/accelerate.md."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stager import (
    ArgumentError,
    Checkpointer,
    CheckpointNotFoundError,
    ConfigError,
    PathCheckpointer,
    StateMismatchError,
    UsageError,
    load_checkpoint,
    verify,
)
from tests import scripts
from tests.faults import Faults
from tests.integrations.training import Ended, final, page_script, resumes_bit_equal, resumes_from_any_point
from tests.integrations.training import Training as Script
from tests.staging.ranks import run_ranks
from tests.states import same

pytestmark = pytest.mark.filterwarnings("ignore")  # accelerate and torchdata warn of devices and their own code

accelerate = pytest.importorskip("accelerate", reason="pip install 'stager[accelerate]'")
pytest.importorskip("torchdata", reason="pip install torchdata")

from accelerate.optimizer import AcceleratedOptimizer

from stager.integrations.accelerate import DIRECTORY, AcceleratorCheckpointer, state
from tests.integrations.accelerate_bodies import CONFIG, PER_EPOCH, Registered, Training, reset

BODIES = "tests.integrations.accelerate_bodies"
positions_on_ranks = pytest.mark.skipif(
    tuple(map(int, accelerate.__version__.split(".")[:2])) < (1, 13),
    reason="Accelerate before 1.13 counts the position wrong where several processes have a stateful loader",
)


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """No Accelerator of another test; one thread of torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    reset()
    yield
    reset()
    torch.set_num_threads(before)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "project"


def checkpoints(out: Path) -> list[str]:
    """What is a checkpoint, whatever else is there."""
    return sorted(name for name in os.listdir(out / DIRECTORY) if not name.startswith("."))


def new_checkpointer(training: Training, **options: Any) -> AcceleratorCheckpointer:
    return AcceleratorCheckpointer(training.accelerator, CONFIG, **options)


def flip_a_byte(checkpoint: Path) -> None:
    (path,) = checkpoint.glob("__0_0.distcp")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


# -- what is saved ---------------------------------------------------------------------------------------------------


def test_everything_that_accelerate_saves_is_in_the_state_under_the_names_of_its_files(out: Path) -> None:
    training = Training(out)
    accelerator = training.accelerator
    second = torch.nn.Linear(2, 2)
    accelerator.prepare(second, torch.optim.SGD(second.parameters(), lr=0.1, momentum=0.9))
    accelerator.register_for_checkpointing(Registered("second"))
    accelerator.scaler = torch.amp.GradScaler("cpu")
    found = state(accelerator)
    assert list(found) == [
        "model",
        "model_1",
        "optimizer",
        "optimizer_1",
        "scheduler",
        "custom_checkpoint_0",
        "custom_checkpoint_1",
        "scaler",
        "counters",
        "dataloader",
        "random_states",
    ]
    assert type(found["optimizer"]) is torch.optim.AdamW and type(found["optimizer_1"]) is torch.optim.SGD


@pytest.mark.parametrize("guard", [True, pytest.param(False, marks=pytest.mark.long)])
def test_all_of_it_is_restored(out: Path, guard: bool) -> None:
    training = Training(out)
    training.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with new_checkpointer(training, guard=guard) as checkpointer:
        training.step(3)
        training.accelerator.step = 7
        handle = checkpointer.save_state()
        made = training.made()
        handle.upload_completion.result()
    assert verify(handle.upload_completion.result().path).ok

    reset()
    again = Training(out, seed=1)
    again.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    with new_checkpointer(again, guard=guard) as checkpointer:
        loaded = checkpointer.load_state()
    assert loaded is not None and loaded.step == 0
    assert same(again.made(), made)
    assert again.accelerator.step == 7
    assert again.accelerator.scaler.get_scale() == 8.0


def test_state_is_for_any_checkpointer(out: Path, tmp_path: Path) -> None:
    training = Training(out)
    with Checkpointer(tmp_path / "run", CONFIG) as ckpt:
        training.step(2)
        ckpt.save(2, state(training.accelerator))
        made = training.made()
        training.step(2)
        ckpt.load(into=state(training.accelerator))
    assert same(training.made(), made)


@pytest.mark.parametrize(
    "taken", [pytest.param(2, marks=pytest.mark.long), PER_EPOCH - 1, PER_EPOCH, PER_EPOCH + 1], ids=str
)
def test_a_stateful_loader_goes_on_at_the_next_batch(out: Path, taken: int) -> None:
    """Also behind the last batch of an epoch, when the loop over the loader has not ended yet."""
    training = Training(out)
    with new_checkpointer(training) as checkpointer:
        for _ in range(taken):
            training.batch()
        checkpointer.save_state()
        following = [training.batch() for _ in range(PER_EPOCH + 1)]

    reset()
    again = Training(out)  # with the same seed, by which it shuffles
    with new_checkpointer(again) as checkpointer:
        checkpointer.load_state()
    assert again.loader.iteration == taken // PER_EPOCH
    assert same(following, [again.batch() for _ in range(PER_EPOCH + 1)])


def test_a_loader_without_a_position_keeps_its_epoch(out: Path) -> None:
    training = Training(out, stateful=False)
    with new_checkpointer(training) as checkpointer:
        for _ in range(PER_EPOCH + 1):
            training.batch()
        checkpointer.save_state()
        following = [training.batch() for _ in range(PER_EPOCH - 1)]
    reset()
    again = Training(out, stateful=False)
    with new_checkpointer(again) as checkpointer:
        checkpointer.load_state()
    rest = again.accelerator.skip_first_batches(again.loader, 1)
    rest.set_epoch(again.loader.iteration)  # Accelerate 1.15 does so itself
    assert same(following, [rows for (rows,) in rest])


@pytest.mark.long  # its import
def test_a_compiled_model_has_the_names_of_the_model(out: Path) -> None:
    training = Training(out)
    model = training.accelerator._models[0]
    training.accelerator._models[0] = torch.compile(model)
    assert state(training.accelerator)["model"] is model


def test_an_object_whose_methods_are_its_own_is_saved_by_them(out: Path) -> None:
    training = Training(out)
    taken: list[Any] = []
    training.accelerator.register_for_checkpointing(
        SimpleNamespace(state_dict=lambda: {"a": 1}, load_state_dict=taken.append)
    )
    with new_checkpointer(training) as checkpointer:
        checkpointer.save_state()
        checkpointer.load_state()
    assert taken == [{"a": 1}]


# -- names, and how many ----------------------------------------------------------------------------------------------


def test_numbers_go_on_behind_all_that_are_there(out: Path) -> None:
    training = Training(out)
    with new_checkpointer(training) as checkpointer:
        assert checkpointer.load_state() is None and training.accelerator.save_iteration == 0
        for _ in range(3):
            training.step()
            checkpointer.save_state()
        assert training.accelerator.save_iteration == 3
    assert checkpoints(out) == ["checkpoint_0", "checkpoint_1", "checkpoint_2"]

    reset()
    again = Training(out)
    with new_checkpointer(again) as checkpointer:
        loaded = checkpointer.load_state(out / DIRECTORY / "checkpoint_0")
        assert loaded is not None and loaded.step == 0 and again.registered.value == 1
        again.step()
        checkpointer.save_state()
        again.registered.value = -1
        loaded = checkpointer.load_state()  # the newest is that of the training that went on from 0
    assert loaded is not None and loaded.step == 3 and again.registered.value == 2


def test_a_number_that_is_taken_is_an_error_and_changes_nothing(out: Path) -> None:
    training = Training(out)
    with new_checkpointer(training) as checkpointer:
        checkpointer.save_state().upload_completion.result()
        training.accelerator.project_configuration.iteration = 0
        with pytest.raises(ArgumentError, match=r"checkpoint_0 exists; call load_state\(\) before the first"):
            checkpointer.save_state()
        training.accelerator.project_configuration.iteration = 7
        checkpointer.save_state()
    assert checkpoints(out) == ["checkpoint_0", "checkpoint_7"]


def test_total_limit_removes_the_oldest_when_the_newest_is_committed_and_not_before(out: Path, faults: Faults) -> None:
    training = Training(out, total_limit=1)
    hold = faults.hold("commit.begin", after=1)
    with hold, new_checkpointer(training) as checkpointer:
        checkpointer.save_state().upload_completion.result()
        handle = checkpointer.save_state()
        hold.wait()
        assert checkpoints(out) == ["checkpoint_0"]
        hold.release()
        handle.upload_completion.result()
    assert checkpoints(out) == ["checkpoint_1"]


def test_a_damaged_checkpoint_is_passed_over_and_its_number_is_not_used_again(out: Path) -> None:
    training = Training(out)
    with new_checkpointer(training) as checkpointer:
        for _ in range(2):
            training.step()
            checkpointer.save_state()
    flip_a_byte(out / DIRECTORY / "checkpoint_1")
    reset()
    again = Training(out)
    with new_checkpointer(again) as checkpointer:
        loaded = checkpointer.load_state()
        assert loaded is not None and loaded.step == 0 and again.registered.value == 1
        checkpointer.save_state()
    assert checkpoints(out) == ["checkpoint_0", "checkpoint_1", "checkpoint_2"]


def test_a_load_waits_for_the_save_that_is_in_flight(out: Path, faults: Faults) -> None:
    faults.arm("part.write", "delay 0.2")
    training = Training(out)
    with new_checkpointer(training) as checkpointer:
        training.step(2)
        handle = checkpointer.save_state()
        made = training.made()
        assert not handle.upload_completion.done()
        training.step()
        loaded = checkpointer.load_state()
    assert loaded is not None and loaded.step == 0 and same(training.made(), made)


def test_without_automatic_naming_the_caller_says_where(tmp_path: Path) -> None:
    training = Training(None)
    with new_checkpointer(training) as checkpointer:
        assert isinstance(checkpointer.checkpointer, PathCheckpointer)
        for value in (1, 2):
            training.registered.value = value
            checkpointer.save_state(tmp_path / "step_5", metrics={"loss": 0.5}, files={"note.txt": b"mine"})
        training.registered.value = 0
        loaded = checkpointer.load_state(tmp_path / "step_5")
        assert loaded is not None and loaded.step == 5 and training.registered.value == 2
        assert loaded.files["note.txt"] == b"mine" and loaded.info is not None and loaded.info.metrics == {"loss": 0.5}
        with pytest.raises(CheckpointNotFoundError):
            checkpointer.load_state(tmp_path / "step_6")
        with pytest.raises(ArgumentError, match=r"without output_dir"):
            checkpointer.save_state()
        with pytest.raises(ArgumentError, match=r"without input_dir"):
            checkpointer.load_state()


def test_with_automatic_naming_a_directory_is_refused_and_any_checkpoint_is_loaded(out: Path, tmp_path: Path) -> None:
    training = Training(out)
    with PathCheckpointer(CONFIG) as elsewhere:
        training.registered.value = 5
        elsewhere.save(tmp_path / "elsewhere/best", state(training.accelerator))
    with new_checkpointer(training) as checkpointer:
        with pytest.raises(ArgumentError, match=r"output_dir='here', and automatic_checkpoint_naming is on"):
            checkpointer.save_state("here")
        training.registered.value = 0
        loaded = checkpointer.load_state(tmp_path / "elsewhere/best")
        assert loaded is not None and training.registered.value == 5 and training.accelerator.save_iteration == 1
        with pytest.raises(CheckpointNotFoundError):
            checkpointer.load_state(out / DIRECTORY / "checkpoint_9")


# -- beside Accelerate's own ------------------------------------------------------------------------------------------


def test_a_run_that_was_begun_without_stager_goes_on(out: Path, caplog: pytest.LogCaptureFixture) -> None:
    training = Training(out)
    for _ in range(2):
        training.step()
        training.accelerator.save_state()
    made = training.made()
    reset()
    again = Training(out, seed=1)
    with new_checkpointer(again) as checkpointer, caplog.at_level(logging.INFO, logger="stager"):
        loaded = checkpointer.load_state()
        assert loaded is not None and loaded.step == 1 and loaded.path == str(out / "checkpoints/checkpoint_1")
        assert "Accelerate loads" in caplog.text
        assert same(again.made(), made)
        checkpointer.save_state()
        assert again.accelerator.save_iteration == 3
        loaded = checkpointer.load_state()
        assert loaded is not None and loaded.path == str(out / DIRECTORY / "checkpoint_2")
        loaded = checkpointer.load_state(out / "checkpoints/checkpoint_0")
        assert loaded is not None and loaded.step == 0 and again.registered.value == 1


def test_neither_program_touches_the_checkpoints_of_the_other(out: Path) -> None:
    training = Training(out, total_limit=1)
    with new_checkpointer(training) as checkpointer:
        checkpointer.save_state().upload_completion.result()
        for value in (10, 11):
            training.registered.value = value
            training.accelerator.save_state()
        training.registered.value = 0
        training.accelerator.load_state()
        assert training.registered.value == 11
        checkpointer.load_state()
        assert training.registered.value == 0
    assert checkpoints(out) == ["checkpoint_0"] and os.listdir(out / "checkpoints") == ["checkpoint_2"]


def test_by_hand_a_checkpoint_of_accelerate_is_loaded_by_accelerate(tmp_path: Path) -> None:
    training = Training(None)
    training.registered.value = 4
    training.accelerator.save_state(str(tmp_path / "stock"))
    training.registered.value = 0
    with new_checkpointer(training) as checkpointer:
        loaded = checkpointer.load_state(tmp_path / "stock")
    assert loaded is not None and loaded.step is None and training.registered.value == 4


# -- guard ------------------------------------------------------------------------------------------------------------


def test_the_optimizers_inside_are_guarded_also_those_that_are_prepared_later(out: Path) -> None:
    training = Training(out)
    inner: Any = training.optimizer.optimizer
    layer = torch.nn.Linear(2, 2)
    later: Any = torch.optim.SGD(layer.parameters(), lr=0.1)
    with new_checkpointer(training) as checkpointer:
        assert len(inner._optimizer_step_pre_hooks) == 1
        training.accelerator.prepare(layer, later)
        checkpointer.save_state()
        checkpointer.save_state()
        assert len(inner._optimizer_step_pre_hooks) == len(later._optimizer_step_pre_hooks) == 1
    assert not inner._optimizer_step_pre_hooks and not later._optimizer_step_pre_hooks
    with new_checkpointer(training, guard=False) as checkpointer:
        checkpointer.load_state()
        assert not inner._optimizer_step_pre_hooks


def test_an_optimizer_with_two_sets_of_weights_is_not_guarded(out: Path) -> None:
    class Swaps(torch.optim.SGD):
        def train(self) -> None: ...

        def eval(self) -> None: ...

    training = Training(out)
    layer = torch.nn.Linear(2, 2)
    swaps: Any = Swaps(layer.parameters(), lr=0.1)
    training.accelerator.prepare(layer, swaps)
    with new_checkpointer(training):
        assert training.optimizer.optimizer._optimizer_step_pre_hooks and not swaps._optimizer_step_pre_hooks


class Foreign:
    """An optimizer that is none of torch's."""

    def __init__(self) -> None:
        self.steps = 0

    def state_dict(self) -> dict[str, int]:
        return {"steps": self.steps}

    def load_state_dict(self, found: dict[str, int]) -> None:
        self.steps = found["steps"]


def test_an_optimizer_that_wraps_none_of_torchs_is_refused_unless_nothing_is_guarded(out: Path) -> None:
    training = Training(out)
    foreign = Foreign()
    training.accelerator._optimizers.append(AcceleratedOptimizer(foreign))
    with pytest.raises(ArgumentError, match=r"a Foreign, is no torch.optim.Optimizer .* guard=False"):
        new_checkpointer(training)
    with new_checkpointer(training, guard=False) as checkpointer:
        foreign.steps = 3
        checkpointer.save_state()
        foreign.steps = 0
        checkpointer.load_state()
    assert foreign.steps == 3


# -- what is refused --------------------------------------------------------------------------------------------------


def test_an_object_without_a_state_is_named(out: Path) -> None:
    training = Training(out)
    training.accelerator._custom_objects.append(object())
    with pytest.raises(
        ArgumentError, match=r"custom_checkpoint_1 of the Accelerator is a object, which has no state_dict"
    ):
        state(training.accelerator)


def test_an_object_more_than_was_saved_is_named(out: Path) -> None:
    training = Training(out)
    with new_checkpointer(training) as checkpointer:
        checkpointer.save_state()
        training.accelerator.register_for_checkpointing(Registered())
        with pytest.raises(StateMismatchError, match="custom_checkpoint_1"):
            checkpointer.load_state()
        assert checkpointer.load_state(strict=False) is not None


def test_hooks_that_would_not_be_called_are_refused(out: Path) -> None:
    training = Training(out)
    with new_checkpointer(training) as checkpointer:
        hook = training.accelerator.register_save_state_pre_hook(lambda *_: None)
        with pytest.raises(UsageError, match=r"register_save_state_pre_hook\(\), and stager does not call them"):
            checkpointer.save_state()
        hook.remove()
        training.accelerator.register_load_state_pre_hook(lambda *_: None)
        checkpointer.save_state()
        with pytest.raises(UsageError, match=r"register_load_state_pre_hook\(\)"):
            checkpointer.load_state()


@pytest.mark.parametrize(
    ("kind", "message"),
    [("DEEPSPEED", "runs DEEPSPEED"), ("MEGATRON_LM", "runs MEGATRON_LM"), ("FSDP", "first version of FSDP")],
)
def test_engines_that_save_themselves_are_refused(out: Path, kind: str, message: str) -> None:
    from accelerate.utils import DistributedType

    training = Training(out)
    training.accelerator.state.distributed_type = getattr(DistributedType, kind)
    training.accelerator.state.fsdp_plugin = SimpleNamespace(fsdp_version=1)
    with pytest.raises(UsageError, match=message):
        new_checkpointer(training)
    with pytest.raises(UsageError, match=message):
        state(training.accelerator)


def test_configurations_that_cannot_be_meant_are_refused(out: Path) -> None:
    rules = {**CONFIG, "retention": {"keep_latest": 3}}
    with pytest.raises(ConfigError, match=r"total_limit=2, and retention has rules"):
        AcceleratorCheckpointer(Training(out, total_limit=2).accelerator, rules)
    with pytest.raises(ConfigError, match="save_on_each_node"):
        new_checkpointer(Training(out, save_on_each_node=True))
    training = Training(out)
    training.accelerator.project_configuration.project_dir = None
    with pytest.raises(ArgumentError, match="no project_dir"):
        new_checkpointer(training)
    with AcceleratorCheckpointer(Training(out).accelerator, rules) as checkpointer:
        assert checkpointer.load_state() is None  # rules of one's own are for whoever gives no total_limit


# -- the end ----------------------------------------------------------------------------------------------------------


def test_end_training_waits_for_commits_and_ends_the_trackers(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(out)
    ended: list[list[str]] = []
    monkeypatch.setattr(training.accelerator, "end_training", lambda: ended.append(checkpoints(out)))
    checkpointer = new_checkpointer(training)
    checkpointer.save_state()
    checkpointer.end_training()
    checkpointer.close()
    assert ended == [["checkpoint_0"]]


def test_an_error_of_a_save_is_raised_at_the_end_and_the_trackers_end_all_the_same(
    out: Path, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(out)
    ended: list[bool] = []
    monkeypatch.setattr(training.accelerator, "end_training", lambda: ended.append(True))
    faults.arm("part.write", "errno ENOSPC")
    checkpointer = new_checkpointer(training)
    checkpointer.save_state()
    with pytest.raises(OSError, match="No space left"):
        checkpointer.end_training()
    assert ended == [True] and checkpoints(out) == []


# -- several processes, and whole scripts -----------------------------------------------------------------------------


@positions_on_ranks
def test_two_processes_save_one_checkpoint_which_one_process_loads(tmp_path: Path, out: Path) -> None:
    results = run_ranks(f"{BODIES}:saved_by_ranks", 2, tmp_path, str(out))
    for drawn, again, row, row_again in results:
        assert drawn == again and row == row_again
    assert results[0] != results[1]  # each has its own numbers and rows
    found = load_checkpoint(out / DIRECTORY / "checkpoint_0").state
    assert set(found["model"]) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert set(found["random_states"]) == set(found["dataloader"]) == {"rank-0", "rank-1"}
    training = Training(out)
    with new_checkpointer(training) as checkpointer:
        assert checkpointer.load_state() is not None
    assert same(training.model.state_dict(), {**found["model"]}) and training.registered.value == 3


@pytest.mark.long
def test_a_model_of_fully_shard_is_loaded_by_one_process(tmp_path: Path, out: Path) -> None:
    run_ranks(f"{BODIES}:sharded_by_ranks", 2, tmp_path, str(out))
    whole = torch.load(out / "whole.pt")
    training = Training(out)
    training.accelerator._schedulers.clear()
    with new_checkpointer(training) as checkpointer:
        assert checkpointer.load_state() is not None
    assert same(dict(training.model.state_dict()), dict(whole["model"]))
    inner = training.optimizer.optimizer
    assert same([inner.state[one]["exp_avg"] for one in training.model.parameters()], whole["moments"])


class Forked(Script):
    """The script, in processes that have imported Accelerate already."""

    def run(self, out: Path, *arguments: object, check: bool = True) -> Ended:
        source = f"import warnings\nwarnings.simplefilter('ignore')\n{self.script.read_text()}"
        with warnings.catch_warnings():
            ended = scripts.run(source, out, *arguments, modules=(BODIES,))
        assert not check or ended.returncode == 0, ended
        return Ended(ended.returncode, ended.stdout)


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STAGER_WORKERS__COUNT", "1")
    return page_script("accelerate", tmp_path)


def test_killed_in_the_middle_of_a_save_it_resumes_bit_equal(script: Path, tmp_path: Path, faults: Faults) -> None:
    said = resumes_bit_equal(Forked(script), tmp_path, faults, "save.copied", 3)
    assert "resumed at step 12" in said


@positions_on_ranks
def test_ddp_on_two_ranks_resumes_bit_equal(
    script: Path, tmp_path: Path, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(out: str) -> list[Any]:
        results = run_ranks(f"{BODIES}:page", 2, tmp_path, str(script), str(tmp_path / out))
        for path in (tmp_path / "store", *tmp_path.glob("result-*.json")):
            path.unlink(missing_ok=True)
        return results

    trained("whole")
    faults.arm("save.copied", "kill after=3")
    with monkeypatch.context() as killing:
        killing.setenv("STAGER_TEST_IS_KILLED", "yes")
        assert trained("broken") == [None, None]
    assert faults.fired("save.copied")
    assert trained("broken") == ["trained", "trained"]
    assert same(final(tmp_path / "whole"), final(tmp_path / "broken"))


@pytest.mark.long
@pytest.mark.parametrize("point", ["save.copied", "save.handed-over", "part.written", "commit.published"])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_script_by_itself_and_by_torchrun_resumes_bit_equal(
    script: Path, tmp_path: Path, faults: Faults, point: str, num_ranks: int
) -> None:
    """At a worker's point: first the worker is killed, and replaced; a save later, the trainer is."""
    resumes_from_any_point(Script(script, num_ranks), tmp_path, faults, point, 3)
