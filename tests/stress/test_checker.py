"""The checker finds what is planted in a run's directory."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from stager import Checkpointer
from stager.stress import checker
from stager.stress.checker import Expectation, check_directory
from stager.stress.damage import inflict_damage
from stager.stress.digest import digest
from stager.stress.fault_kinds import Damage
from stager.stress.training import Training, digests_of
from stager.workers.checkpoint.read.verify import VerifyReport
from tests.stress.plans import config, training

STEPS = 7  # leaves come, grow and go in these


@pytest.fixture(scope="module")
def truth() -> list[str]:
    return list(digests_of(training(), STEPS))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's directory with the checkpoints of steps 0 to 6."""
    directory = tmp_path_factory.mktemp("checked") / "run"
    run = Training(training())
    with Checkpointer(directory, config()) as ckpt:
        for step in range(STEPS):
            run.advance()
            ckpt.save(step, run.state)
    return directory


@pytest.fixture
def directory(saved: Path, tmp_path: Path) -> str:
    """A copy that the test may damage."""
    return str(shutil.copytree(saved, tmp_path / "run"))


@pytest.fixture
def expected(truth: list[str]) -> Expectation:
    return Expectation(truth, required=range(STEPS))


def test_what_is_right_is_right(directory: str, expected: Expectation) -> None:
    found = check_directory(directory, expected)
    assert (found.problems, found.missing, found.valid) == ((), (), tuple(reversed(range(STEPS))))


def test_resumed_training_has_the_same_digests(directory: str, truth: list[str]) -> None:
    for step in (0, 2, 4, STEPS - 2):  # before and after leaves come and go
        with Checkpointer(directory, config(), read_only=True) as ckpt:
            run = Training(training(), step)
            assert ckpt.load(step, into=run.state) is not None
        assert digest(run.state) == truth[step]
        run.advance()
        assert digest(run.state) == truth[step + 1]


@pytest.mark.parametrize("how", ["flip", "truncate", "remove", "extend"])
def test_damage_is_found(directory: str, expected: Expectation, how: str) -> None:
    for step, file in zip(reversed(range(STEPS)), (0.0, 0.5, 0.99), strict=False):
        expected = replace(expected, required=range(step + 1))
        damaged = inflict_damage(directory, Damage(how, True, file, 0.3))
        assert damaged is not None and damaged.step == step
        found = check_directory(directory, expected)
        assert damaged.step in found.invalid and damaged.step in found.missing
        assert any(f"step {damaged.step} is committed and invalid" in problem for problem in found.problems)
        on_purpose = replace(expected, damaged={damaged.step: damaged.save_id})
        forgiven = check_directory(directory, on_purpose)
        assert (forgiven.problems, forgiven.missing) == ((), ())
        shutil.rmtree(Path(directory) / f"step-{damaged.step:08d}")


def test_checkpoint_that_is_not_there_is_missing(directory: str, expected: Expectation) -> None:
    shutil.rmtree(Path(directory) / "step-00000003")
    assert check_directory(directory, expected).missing == (3,)


def test_whole_checkpoint_of_another_state_is_found(directory: str, expected: Expectation) -> None:
    lied = replace(expected, digests=["a lie" if step == 4 else d for step, d in enumerate(expected.digests)])
    found = check_directory(directory, lied)
    assert found.problems == ("step 4 verifies but does not hold the state after step 4",)


def test_renamed_checkpoint_is_found(directory: str, expected: Expectation) -> None:
    (Path(directory) / "step-00000006").rename(Path(directory) / "step-00000007")
    found = check_directory(directory, expected)
    assert 7 in found.invalid and found.missing == (6,)


def test_what_was_left_or_does_not_belong_is_found(directory: str, expected: Expectation) -> None:
    (Path(directory) / "step-00000009.partial-ab").mkdir()
    (Path(directory) / "core").touch()
    found = check_directory(directory, expected)
    assert found.problems == ("core does not belong here", "step-00000009.partial-ab (step 9) was not cleaned up")
    assert check_directory(directory, replace(expected, partials_allowed=True)).problems == found.problems[:1]
    (Path(directory) / "step-00000009.partial-ab").rmdir()


def test_verification_that_misses_known_damage_is_found(
    directory: str, expected: Expectation, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = inflict_damage(directory, Damage("flip", True, 0.2, 0.5))
    assert damaged is not None
    blind = VerifyReport("", True, (), 0, 0, 0.0)
    monkeypatch.setattr(checker, "verify_checkpoint", lambda *_, **__: blind)
    with pytest.raises(checker.UnnoticedDamageError):
        check_directory(directory, replace(expected, damaged={damaged.step: damaged.save_id}))


def test_latest_that_is_not_the_newest_is_found(
    directory: str, expected: Expectation, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Checkpointer(directory, read_only=True) as ckpt:
        older = ckpt.checkpoints()[2]
    monkeypatch.setattr(Checkpointer, "latest", lambda _: older)
    found = check_directory(directory, expected)
    assert found.problems == (f"latest() returns step {older.step}; the newest valid one is {STEPS - 1}",)
