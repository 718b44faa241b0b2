"""What people write as a step, a state or a path: taken if it is clear, else one sentence that says what to do."""

from __future__ import annotations

import enum
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stager import ArgumentError, Checkpointer, CheckpointNotFoundError, UsageError, load_checkpoint
from stager.config.arguments import as_step
from tests.persistence.tasks import save
from tests.states import same

FAST = {"workers": {"count": 1}, "persistence": {"fsync": False}}


def state_of(step: int) -> dict[str, Any]:
    return {"x": torch.full((5,), float(step))}


class Milestone(enum.IntEnum):
    THIRD = 3


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpointer]:
    with Checkpointer(tmp_path_factory.mktemp("run"), FAST) as opened:
        for step in (1, 3, 20):
            opened.save(step, state_of(step)).upload_completion.result()
        yield opened


STEPS: dict[str, Any] = {
    "int": 3,
    "numpy": np.int64(3),
    "unsigned": np.uint8(3),
    "0-d array": np.array(3),
    "0-d tensor": torch.tensor(3),
    "small tensor": torch.tensor(3, dtype=torch.int16),
    "enum": Milestone.THIRD,
}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_integers_of_all_kinds_are_steps(step: Any, ckpt: Checkpointer) -> None:
    handle = ckpt.save(step, state_of(3))
    assert handle.step == 3 and type(handle.step) is int
    loaded = ckpt.load(step)
    assert loaded is not None and loaded.step == 3
    ckpt.protect(step)
    ckpt.unprotect(step)


BAD_STEPS: dict[str, tuple[Any, str]] = {
    "bool": (True, r"step must be an integer of 0 or more, got True \(bool\)"),
    "numpy bool": (np.True_, r"got a bool"),
    "bool tensor": (torch.tensor(True), "got a Tensor of shape"),
    "float": (3.0, r"got 3.0 \(float\); convert it with int\(\)"),
    "numpy float": (np.float32(3), "convert it with int"),
    "text": ("3", r"got '3' \(str\); write 3"),
    "float tensor": (torch.tensor(3.0), r"got a Tensor of shape \(\); convert it with int\(\)"),
    "vector": (torch.tensor([3]), r"got a Tensor of shape \(1,\); convert"),
    "array": (np.array([3, 4]), r"got a ndarray of shape \(2,\); give one number"),
    "list": ([3], "got a list"),
    "negative": (-1, r"got -1\b"),
    "negative numpy": (np.int32(-4), r"got -4\b"),
}


@pytest.mark.parametrize(("step", "words"), BAD_STEPS.values(), ids=BAD_STEPS)
def test_what_is_no_step_is_refused_everywhere(step: Any, words: str, ckpt: Checkpointer) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: ckpt.save(step, state_of(1)),
        lambda: ckpt.load(step),
        lambda: ckpt.protect(step),
        lambda: ckpt.unprotect(step),
    ]
    for call in calls:
        with pytest.raises(ArgumentError, match=words) as raised:
            call()
        assert isinstance(raised.value, (TypeError, ValueError)) and "\n" not in str(raised.value)
    assert [info.step for info in ckpt.checkpoints()] == [1, 3, 20]


def test_no_step_at_all() -> None:
    with pytest.raises(ArgumentError, match="got None"):
        as_step(None)


def test_one_signal_for_preemption(ckpt: Checkpointer) -> None:
    assert not ckpt.on_preemption(signal.SIGUSR2).requested


MODULE = torch.nn.Linear(2, 2)
OPTIMIZER = torch.optim.SGD(MODULE.parameters(), lr=0.1)

BAD_SAVES: dict[str, tuple[tuple[Any, Any], str]] = {
    "swapped": (({"x": torch.ones(2)}, 3), r"save\(\) takes the step first.*got a dict as step and 3 \(int\) as state"),
    "swapped module": ((MODULE, 3), "save.. takes the step first.*got a Linear as step"),
    "module": ((3, MODULE), r'state must be a mapping, got a Linear; give it a name.*save\(100, \{"model": model\}\)'),
    "tensor": ((3, torch.ones(2)), r"got a Tensor of shape \(2,\); give each value a name"),
    "list": ((3, [torch.ones(2)]), "got a list; give each value a name"),
    "None": ((3, None), "got None; give each value a name"),
    "a path": ((Path("step-00000003"), {"x": 1}), r"step must be an integer.*PosixPath"),
}


@pytest.mark.parametrize(("given", "words"), BAD_SAVES.values(), ids=BAD_SAVES)
def test_what_is_no_save(given: tuple[Any, Any], words: str, ckpt: Checkpointer) -> None:
    with pytest.raises(ArgumentError, match=words):
        ckpt.save(*given)


@pytest.mark.parametrize("state", [MODULE, None, [1]], ids=["module", "None", "list"])
def test_warmup_of_what_is_no_state(state: Any, ckpt: Checkpointer) -> None:
    with pytest.raises(ArgumentError, match=r"state must be a mapping.*warmup\(\{"):
        ckpt.warmup(state)


def test_state_first_is_what_is_loaded_into(ckpt: Checkpointer) -> None:
    state = {"x": torch.zeros(5)}
    loaded = ckpt.load(state)
    assert loaded is not None and loaded.step == 20 and loaded.state is state and same(state, state_of(20))


@pytest.mark.parametrize("kind", ["info", "path", "text", "name", "url"])
def test_checkpoint_of_this_run_in_the_place_of_a_step(kind: str, ckpt: Checkpointer) -> None:
    info = ckpt.checkpoints()[0]
    step: Any = {
        "info": info,
        "path": Path(info.path),
        "text": os.path.relpath(info.path),
        "name": "step-00000001",
        "url": f"file://{info.path}",
    }[kind]
    loaded = ckpt.load(step)
    assert loaded is not None and loaded.step == 1


BAD_LOADS: dict[str, tuple[tuple[Any, Any], str]] = {
    "swapped": (({"x": 1}, 3), r"load\(\) takes the step first.*got a dict as step and 3 \(int\) as into"),
    "step as into": ((None, 3), r"load\(\) takes the step first, as in load\(3, into=state\)"),
    "list": (
        (3, []),
        r"into must be a mapping or an object with load_state_dict\(\), got a list; write the names that were saved",
    ),
    "latest": (("latest", None), "load.. without a step loads the newest"),
    "another run": (("elsewhere/step-00000003", None), r"is no checkpoint of .*load_checkpoint\(path\)"),
    "a run": ((Path("somewhere"), None), r"is no checkpoint of .*load_checkpoint\(path\)"),
}


@pytest.mark.parametrize(("given", "words"), BAD_LOADS.values(), ids=BAD_LOADS)
def test_what_is_no_load(given: tuple[Any, Any], words: str, ckpt: Checkpointer) -> None:
    with pytest.raises(ArgumentError, match=words):
        ckpt.load(*given)


def test_missing_step_says_which_there_are(run_dir: Path) -> None:
    def message(step: int) -> str:
        with pytest.raises(CheckpointNotFoundError) as raised, Checkpointer(run_dir, read_only=True) as ckpt:
            ckpt.load(step)
        return str(raised.value).removeprefix(f"{run_dir}: there is no checkpoint of step {step}")

    assert message(7) == f"{run_dir}: does not exist, so there is no checkpoint of step 7; check the path"
    run_dir.mkdir()
    assert message(7) == ", and no other one"
    save(run_dir, state_of(5), step=5, fsync=False)
    assert message(7) == "; there is step 5"
    save(run_dir, state_of(9), step=9, fsync=False)
    assert message(7) == "; there are steps 5 and 9"
    for step in (20, 30):
        save(run_dir, state_of(step), step=step, fsync=False)
    assert message(7) == "; of 4, the nearest are steps 5 and 9, the newest is 30"
    assert message(25) == "; of 4, the nearest is step 20, the newest is 30"
    assert message(31) == "; of 4, the newest is 30"
    (run_dir / "step-00000007.partial-ab").mkdir()
    assert message(7).startswith(" (its save was not committed, or is still being written); of 4")
    (run_dir / "step-00000007.partial-ab").rmdir()


@pytest.fixture
def checkpoint(run_dir: Path) -> Path:
    for step in (1, 2):
        save(run_dir, state_of(step), step=step, fsync=False)
    return run_dir / "step-00000002"


def test_checkpoint_opened_as_a_run_is_refused_and_left_as_it_is(checkpoint: Path) -> None:
    before = sorted(os.listdir(checkpoint))
    with pytest.raises(UsageError, match=rf"one checkpoint.*Checkpointer\('{checkpoint.parent}'\), and load\(2\)"):
        Checkpointer(checkpoint)
    assert sorted(os.listdir(checkpoint)) == before
    missing = checkpoint.with_name("step-00000005")
    with pytest.raises(UsageError, match="one checkpoint"):
        Checkpointer(missing)
    assert not missing.exists()


def test_renamed_checkpoint_opened_as_a_run_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    best = checkpoint.rename(tmp_path / "best")
    with pytest.raises(UsageError, match=r"one checkpoint, not the directory of a run; to read this checkpoint alone"):
        Checkpointer(best)
    with Checkpointer(best, read_only=True) as ckpt:
        loaded = ckpt.load()
        assert loaded is not None and loaded.step == 2 and same(loaded.state, state_of(2))


def test_read_only_of_one_checkpoint_has_just_that_one(checkpoint: Path) -> None:
    with Checkpointer(checkpoint, read_only=True) as ckpt:
        assert [info.step for info in ckpt.checkpoints()] == [2] and ckpt.latest_step() == 2
        target = {"x": torch.zeros(5)}
        loaded = ckpt.load(into=target)
        assert loaded is not None and loaded.step == 2 and loaded.path == str(checkpoint) and same(target, state_of(2))
        for step in (2, checkpoint):
            again = ckpt.load(step)
            assert again is not None and again.step == 2
        with pytest.raises(CheckpointNotFoundError, match="this is the checkpoint of step 2, not of step 1"):
            ckpt.load(1)
        with pytest.raises(UsageError, match="one checkpoint"):
            ckpt.prune(dry_run=True)
    assert load_checkpoint(checkpoint).step == 2


def test_checkpoint_into_which_an_earlier_version_put_a_lock_is_whole(checkpoint: Path) -> None:
    (checkpoint / ".stager.lock").write_text("1 ab\n")
    with Checkpointer(checkpoint.parent, FAST) as ckpt:
        assert ckpt.latest_step() == 2


def test_run_whose_name_is_that_of_a_checkpoint_is_a_run(tmp_path: Path) -> None:
    run_dir = tmp_path / "step-00000007"
    save(run_dir, state_of(1), step=1, fsync=False)
    with Checkpointer(run_dir, FAST) as ckpt:
        assert ckpt.latest_step() == 1
