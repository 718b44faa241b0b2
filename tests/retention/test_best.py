"""``keep_best`` and ``keep_every_secs``: by what the manifests say."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import stager
from stager import Checkpointer, ConfigError, KeepBest, UsageError
from stager.cli.prune_command import _keep_best
from stager.config import load_config
from stager.workers.checkpoint.directory.manifest_file import read_manifest
from stager.workers.checkpoint.documents import metrics as codec
from stager.workers.checkpoint.maintenance import retention_rules
from stager.workers.checkpoint.maintenance.retention import PruneFate, prune
from stager.workers.checkpoint.maintenance.retention_rules import RetentionRules
from tests.persistence.tasks import save
from tests.retention.runs import steps_of

NAN = math.nan


def make_run(directory: Path, losses: dict[int, float | None], created: dict[int, float] | None = None) -> str:
    for step, loss in losses.items():
        given = {} if loss is None else {"metrics": {"loss": loss}}
        when = {} if created is None else {"created": created[step]}
        save(directory, {"x": torch.full((50,), float(step))}, step=step, num_parts=1, fsync=False, **given, **when)
    return str(directory)


@pytest.mark.parametrize(
    ("losses", "rule", "kept"),
    [
        ({1: 3.0, 2: 1.0, 3: 2.0, 4: 9.0}, KeepBest("loss"), [2, 4]),
        ({1: 3.0, 2: 1.0, 3: 2.0, 4: 9.0}, KeepBest("loss", "max"), [4]),
        ({1: 3.0, 2: 1.0, 3: 2.0, 4: 9.0}, KeepBest("loss", "min", 2), [2, 3, 4]),
        ({1: 1.0, 2: 1.0, 3: 1.0, 4: 9.0}, KeepBest("loss"), [3, 4]),  # a tie: the later one
        ({1: 1.0, 2: 1.0, 3: 1.0, 4: 1.0}, KeepBest("loss", "max", 2), [3, 4]),
        ({1: NAN, 2: 5.0, 3: NAN, 4: NAN}, KeepBest("loss"), [2, 4]),
        ({1: NAN, 2: None, 3: NAN, 4: None}, KeepBest("loss"), [1, 2, 3, 4]),  # none has it: all stay
        ({1: None, 2: 5.0, 3: -math.inf, 4: math.inf}, KeepBest("loss"), [3, 4]),
        ({1: None, 2: 5.0, 3: 7.0, 4: math.inf}, KeepBest("loss", "max", 2), [3, 4]),
        ({1: 1.0, 2: 2.0}, KeepBest("accuracy", "max"), [1, 2]),
    ],
)
def test_the_best_stay_and_the_newest(
    run_dir: Path, losses: dict[int, float | None], rule: KeepBest, kept: list[int]
) -> None:
    prune(make_run(run_dir, losses), RetentionRules(keep_best=rule))
    assert steps_of(run_dir) == kept


def test_a_damaged_one_is_not_the_best_and_is_left(run_dir: Path) -> None:
    make_run(run_dir, {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0})
    (run_dir / "step-00000001" / "__0_0.distcp").unlink()
    report = prune(str(run_dir), RetentionRules(keep_best=KeepBest("loss")))
    assert report.steps(PruneFate.LEFT) == [1] and report.damaged == [1]
    assert report.steps(PruneFate.KEPT) == [4, 2]
    assert [verdict.reason for verdict in report.verdicts if verdict.step == 2] == ["one of the best 1: loss is 2"]


def test_without_the_metric_the_other_rules_decide(run_dir: Path) -> None:
    directory = make_run(run_dir, {1: 1.0, 2: 2.0, 3: 3.0})
    report = prune(directory, RetentionRules(keep_best=KeepBest("val_loss")))
    reason = "no valid checkpoint has the metric val_loss, so keep_best removes none"
    assert {verdict.reason for verdict in report.verdicts} == {reason}
    prune(directory, RetentionRules(keep_latest=2, keep_best=KeepBest("val_loss")))
    assert steps_of(run_dir) == [2, 3]


def test_if_the_only_one_with_the_metric_is_damaged_nothing_is_removed(run_dir: Path) -> None:
    make_run(run_dir, {1: None, 2: 2.0, 3: None})
    (run_dir / "step-00000002" / "__0_0.distcp").unlink()
    report = prune(str(run_dir), RetentionRules(keep_best=KeepBest("loss")))
    assert report.steps(PruneFate.KEPT) == [3, 1] and report.damaged == [2]


@pytest.mark.parametrize(
    ("metrics", "has"), [(None, "no metrics"), ({"loss": 1.5}, "loss = 1.5"), ({"val_loss": NAN}, "val_loss = nan")]
)
def test_a_run_whose_saves_lack_the_metric_warns_once_and_loses_nothing(
    run_dir: Path, caplog: pytest.LogCaptureFixture, metrics: dict[str, float] | None, has: str
) -> None:
    config = {"workers": {"count": 1}, "retention": {"keep_best": {"metric": "val_loss"}}}
    with Checkpointer(run_dir, config) as ckpt:
        for step in range(3):
            ckpt.save(step, {"x": torch.ones(3)}, metrics=metrics).upload_completion.result()
    assert steps_of(run_dir) == [0, 1, 2]
    (message,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "'val_loss'" in message and f"this save has {has}:" in message


def test_one_of_each_so_many_seconds_stays_and_stays_the_next_time(run_dir: Path) -> None:
    rules = RetentionRules(keep_every_secs=60)
    created = {step: 1000.0 + 25 * step for step in range(8)}
    for step in created:
        prune(make_run(run_dir, {step: None}, created), rules)
    assert steps_of(run_dir) == [0, 3, 6, 7]  # 0 s, 75 s, 150 s, and the newest
    report = prune(str(run_dir), rules, dry_run=True)
    assert {verdict.reason for verdict in report.verdicts} == {"one of the newest 1", "the first in 60 s"}


def test_a_process_reads_each_manifest_once(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    real = retention_rules.read_header
    monkeypatch.setattr(retention_rules, "read_header", lambda path: (read.append(path), real(path))[1])
    directory = make_run(run_dir, {1: 1.0, 2: 2.0})
    rules = RetentionRules(keep_latest=5, keep_best=KeepBest("loss"))
    prune(directory, rules)
    assert len(read) == 2
    prune(directory, rules)
    make_run(run_dir, {2: 3.0, 3: 1.0})  # 2 is another one now
    prune(directory, rules)
    assert len(read) == 4


def test_metrics_are_kept_with_the_checkpoint_whatever_number_they_are(run_dir: Path) -> None:
    given: dict[str, Any] = {"loss": torch.tensor(0.5), "f1": np.float32(0.25), "n": 3, "nan": NAN, "inf": -math.inf}
    with Checkpointer(run_dir, {"workers": {"count": 1}}) as ckpt:
        info = ckpt.save(1, {"x": torch.ones(3)}, metrics=given).upload_completion.result()
        assert ckpt.save(2, {"x": torch.ones(3)}).upload_completion.result().metrics == {}
        (first, _) = ckpt.checkpoints()
    for metrics in (info.metrics, first.metrics):
        assert math.isnan(metrics.pop("nan"))
        assert metrics == {"loss": 0.5, "f1": 0.25, "n": 3.0, "inf": -math.inf}
    text = (run_dir / "step-00000001" / "manifest.json").read_text()
    assert json.loads(text)["body"]["metrics"]["nan"] == "nan"  # JSON has no NaN
    assert "metrics" not in json.loads((run_dir / "step-00000002" / "manifest.json").read_text())["body"]
    assert read_manifest(run_dir / "step-00000001").header.metrics["loss"] == 0.5


@pytest.mark.filterwarnings("error")
def test_a_loss_that_requires_grad_is_a_metric(run_dir: Path) -> None:
    loss = torch.full((1,), 2.0, requires_grad=True) * 2
    with Checkpointer(run_dir, {"workers": {"count": 1}}) as ckpt:
        handle = ckpt.save(1, {"x": torch.ones(3)}, metrics={"loss": loss, "mean": loss.mean()})  # type: ignore[dict-item]  # tensors are taken, too
        assert handle.upload_completion.result().metrics == {"loss": 4.0, "mean": 4.0}


@pytest.mark.parametrize(
    "metrics",
    [{"loss": "low"}, {"loss": torch.ones(2)}, {3: 1.0}, {"": 1.0}, {"loss": None}, 1.0, [1], "loss", torch.ones(())],
)
def test_what_is_no_metric_is_refused_and_no_save_is_begun(run_dir: Path, metrics: Any) -> None:
    with Checkpointer(run_dir, {"workers": {"count": 1}, "persistence": {"on_save_error": "warn"}}) as ckpt:
        with pytest.raises(UsageError, match="metrics"):
            ckpt.save(1, {"x": torch.ones(3)}, metrics=metrics)
        assert ckpt.checkpoints() == []


@pytest.mark.parametrize("value", [["loss"], {"loss": "low"}, {"loss": True}, {"loss": None}])
def test_metrics_of_a_manifest_that_are_none_are_refused(value: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        codec.decode(value)


def test_in_a_run_the_best_and_the_newest_stay(run_dir: Path) -> None:
    config = {
        "workers": {"count": 2},
        "persistence": {"fsync": False, "incremental": True},
        "retention": {"keep_best": {"metric": "accuracy", "mode": "max"}},
    }
    with Checkpointer(run_dir, config) as ckpt:
        for step, accuracy in enumerate((0.5, 0.9, 0.6, 0.7)):
            state = {"frozen": torch.ones(100_000), "x": torch.full((9,), step)}
            ckpt.save(step, state, metrics={"accuracy": accuracy}).upload_completion.result()
    assert steps_of(run_dir) == [1, 3]  # both whole, although they shared a file with those that went


def test_config_names_what_a_rule_may_be() -> None:
    good = {"retention": {"keep_best": {"metric": "loss"}, "keep_every_secs": 3600}}
    assert load_config(good).retention.keep_best is not None
    assert load_config(overrides=["retention.keep_best={metric: loss, mode: max, count: 2}"]).retention.keep_best
    for bad in ("loss", {"metric": "loss", "mode": "least"}, {"mode": "min"}, {"metric": "loss", "coutn": 3}):
        with pytest.raises(ConfigError, match=r"retention.keep_best: got .*allowed: a mapping such as .metric: loss"):
            load_config({"retention": {"keep_best": bad}})
    with pytest.raises(ConfigError, match="keep_every_secs"):
        load_config({"retention": {"keep_every_secs": 0}})


def test_operation_and_command_take_the_rules(run_dir: Path) -> None:
    make_run(run_dir, {1: 1.0, 2: 2.0, 3: 3.0})
    report = stager.prune(run_dir, keep_best=KeepBest("loss"), dry_run=True)
    assert report.steps(PruneFate.KEPT) == [3, 1]
    for wrong in ({"keep_best": KeepBest("loss", count=0)}, {"keep_every_secs": 0.0}, {"keep_every_secs": NAN}):
        with pytest.raises(UsageError):
            stager.prune(run_dir, **wrong)  # type: ignore[arg-type]  # wrong on purpose
    assert _keep_best("loss") == KeepBest("loss", "min", 1)
    assert _keep_best("val:loss:max:3") == KeepBest("val:loss", "max", 3)
    assert _keep_best("loss:2") == KeepBest("loss", "min", 2)
