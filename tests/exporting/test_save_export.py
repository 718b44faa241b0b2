"""``save(export=...)``: weights exported from the committed checkpoint, and what goes wrong on the way."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import nn

from stager import (
    ArgumentError,
    Checkpointer,
    CheckpointNotFoundError,
    ClosedError,
    LeftRunningError,
    PathCheckpointer,
    SaveState,
    StateMismatchError,
    StorageError,
    UsageError,
    WeightsExport,
    WorkerDiedError,
    export_weights,
    load_checkpoint,
    verify,
)
from stager.exporting.weights_export import command_of
from tests.cli.conftest import Outcome
from tests.crash.aftermath import wait_for_workers_to_end
from tests.exporting.test_weights import assert_holds
from tests.faults import Faults
from tests.staging.ranks import run_ranks

WEIGHTS = {"keys": "model", "strip_prefix": "model."}


def config(**more: Any) -> dict[str, Any]:
    return {"workers": {"count": 1, **more.pop("workers", {})}, "persistence": {"fsync": False}, **more}


def state(value: float = 1.0) -> dict[str, Any]:
    model = nn.Linear(30, 20)
    with torch.no_grad():
        model.weight.fill_(value)
        model.bias.fill_(value)
    return {"model": model, "epoch": int(value)}


def weights(value: int) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((20, 30), float(value)), "bias": torch.full((20,), float(value))}


def names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


def test_weights_are_exported_from_what_was_committed(run_dir: Path, tmp_path: Path) -> None:
    """The state changes after save(); each export has its own step's, in its own dtype, with the save's files."""
    (tmp_path / "tokenizer.json").write_text("{}")
    with Checkpointer(run_dir, config()) as ckpt:
        trained = state(0)
        workers = psutil.Process().children()
        assert ckpt.save(0, trained).export_completion is None
        assert psutil.Process().children() == workers  # no worker for exports, until one is asked for
        handles = []
        for step in (1, 2):
            with torch.no_grad():
                for parameter in trained["model"].parameters():
                    parameter.fill_(step)
            export = WeightsExport(
                tmp_path / "hf-{step:04d}", **WEIGHTS, dtype="bfloat16", sidecars=[tmp_path / "tokenizer.json"]
            )
            handles.append(ckpt.save(step, trained, files={"config.json": b"{}"}, export=export))
            with torch.no_grad():
                trained["model"].weight.fill_(-1)
        (worker,) = set(psutil.Process().children()) - set(workers)
        assert worker.nice() >= 10
        results = [handle.export_completion.result() for handle in handles]
    assert [(result.step, result.path) for result in results] == [
        (step, str(tmp_path / f"hf-000{step}")) for step in (1, 2)
    ]
    for step in (1, 2):
        out = tmp_path / f"hf-000{step}"
        assert names(out) == ["config.json", "model.safetensors", "tokenizer.json"]
        assert_holds(out, {name: tensor.bfloat16() for name, tensor in weights(step).items()})
    assert names(tmp_path) == ["hf-0001", "hf-0002", "run", "tokenizer.json"]


def test_close_waits_for_exports(run_dir: Path, tmp_path: Path) -> None:
    with Checkpointer(run_dir, config()) as ckpt:
        handle = ckpt.save(1, state(), export=WeightsExport(tmp_path / "out", **WEIGHTS))
    assert handle.export_completion is not None and handle.export_completion.done()
    assert_holds(tmp_path / "out", weights(1))


def test_rename_by_a_function_and_by_a_mapping_that_changes_later(run_dir: Path, tmp_path: Path) -> None:
    mapping: dict[str, str | None] = {"bias": None}
    with Checkpointer(run_dir, config()) as ckpt:
        ckpt.save(1, state(), export=WeightsExport(tmp_path / "a", **WEIGHTS, rename=lambda name: f"my.{name}"))
        ckpt.save(2, state(), export=WeightsExport(tmp_path / "b", **WEIGHTS, rename=mapping))
        mapping["weight"] = "changed"
    assert_holds(tmp_path / "a", {f"my.{name}": tensor for name, tensor in weights(1).items()})
    assert_holds(tmp_path / "b", {"weight": weights(1)["weight"]})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"out": 5}, "out must be text or a pathlib.Path, got 5"),
        ({"dtype": "bf16"}, "dtype .* is 'bf16'"),
        ({"rename": "a"}, "rename is a str; give a mapping"),
        ({"max_shard_bytes": 0}, "max_shard_bytes is 0"),
        ({"max_memory_bytes": 1}, "max_memory_bytes is 1 bytes"),
        ({"keys": 5}, "keys must be a pattern"),
    ],
)
def test_argument_that_cannot_be_meant_is_said_when_it_is_made(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        WeightsExport(**{"out": "out", **options})


def test_braces_in_out_are_doubled_for_a_save_and_taken_as_they_are_by_the_function(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXPORTS", str(tmp_path))
    with Checkpointer(run_dir, config()) as ckpt:
        export = WeightsExport("${EXPORTS}/{{a}}-{step:03d}-{step}", **WEIGHTS)
        assert ckpt.save(7, state(), export=export).export_completion.result().path == str(tmp_path / "{a}-007-7")
    export_weights(run_dir, tmp_path / "{step}-{b", **WEIGHTS)
    assert names(tmp_path) == ["run", "{a}-007-7", "{step}-{b"]


@pytest.mark.parametrize("on_save_error", ["raise", "warn"])
def test_what_is_wrong_is_said_by_save_and_nothing_is_lost(
    run_dir: Path, tmp_path: Path, faults: Faults, on_save_error: str
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    lock = threading.Lock()
    refused: list[tuple[Any, type[Exception], str]] = [
        ("out", ArgumentError, r"export must be a stager\.WeightsExport, got 'out'"),
        (WeightsExport(tmp_path / "mine", force=True), UsageError, "which no export of weights wrote"),
        (WeightsExport(tmp_path / "nowhere" / "out"), StorageError, "nowhere does not exist; create it"),
        (WeightsExport(tmp_path / "out", sidecars=[tmp_path / "none"]), UsageError, "none: does not exist"),
        (WeightsExport(tmp_path / "out", rename=lambda name: str(lock)), ArgumentError, "cannot be sent to a worker"),
        *(
            (WeightsExport(tmp_path / f"hf-{braces}"), ArgumentError, says)
            for braces, says in (
                ("{Step}", r"hf-\{Step\}': \{Step\} is nothing that an export knows; write \{step\}, or \{step:08d\}"),
                ("{epoch}", r"\{epoch\} is nothing"),
                ("{}", r"\{\} is nothing"),
                ("{step:8d}", r"\{step:8d\} is nothing"),
                ("{step!r}", r"\{step!r\} is nothing"),
                ("{step.real}", r"\{step\.real\} is nothing"),
                ("{step", "expected '}'"),
                ("step}", "Single '}'"),
            )
        ),
        (WeightsExport(run_dir / "step-{step:08d}"), UsageError, "is the path of the checkpoint itself"),
        (WeightsExport(tmp_path / "held"), UsageError, r"an earlier save exports to it; put \{step\} into out"),
    ]
    persistence = {"fsync": False, "on_save_error": on_save_error}
    with Checkpointer(run_dir, {"workers": {"count": 1}, "persistence": persistence}) as ckpt:
        with faults.hold("export.begin") as held:
            ckpt.save(0, state(), export=WeightsExport(tmp_path / "held", **WEIGHTS))
            held.wait()
            for step, (export, error, says) in enumerate(refused, 1):
                with pytest.raises(error, match=says):
                    ckpt.save(step, state(), export=export)
            again = ckpt.save(9, state(9), export=WeightsExport(tmp_path / "held", **WEIGHTS, force=True))
        assert again.export_completion.result().step == 9
        with pytest.raises(UsageError, match="exists already"):
            ckpt.save(10, state(), export=WeightsExport(tmp_path / "held", **WEIGHTS))
        assert [info.step for info in ckpt.checkpoints()] == [0, 9]
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"


def test_export_that_fails_fails_no_save_and_the_log_has_a_command_that_works(
    run_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Checkpointer(run_dir, config()) as ckpt:
        export = WeightsExport(tmp_path / "out", keys="modle", strip_prefix="model.", dtype="float16", force=True)
        handle = ckpt.save(1, state(), export=export)
        with pytest.raises(StateMismatchError, match="no key matches keys='modle'"):
            handle.export_completion.result()
        assert handle.state is SaveState.COMMITTED
        ckpt.save(2, state(2), export=WeightsExport(tmp_path / "good", **WEIGHTS)).export_completion.result()
    (line,) = [record.message for record in caplog.records if "not exported" in record.message]
    assert "StateMismatchError" in line and "the checkpoint is committed" in line
    command = shlex.split(line.partition("now: ")[2].replace("modle", "model"))
    assert command[0] == "stager" and Outcome(*command[1:]).code == 0
    assert_holds(tmp_path / "out", {name: tensor.half() for name, tensor in weights(1).items()})


def test_command_has_every_argument(tmp_path: Path) -> None:
    export = WeightsExport(
        tmp_path / "an out",
        keys=["model.a*", "model.b"],
        strip_prefix="model.",
        rename={"a": "b"},
        dtype=torch.float16,
        max_shard_bytes="2GB",
        sidecars=["config.json"],
        max_memory_bytes=1 << 29,
        force=True,
    )
    assert shlex.split(command_of(export, "runs/gpt/step-00000001")) == [
        *("stager", "export", "runs/gpt/step-00000001", str(tmp_path / "an out"), "--layout", "hf"),
        *("--keys", "model.a*", "--keys", "model.b", "--strip-prefix", "model.", "--rename", "NAMES"),
        *("--dtype", "float16", "--max-shard-size", "2GB", "--max-memory", str(1 << 29)),
        *("--file", "config.json", "--force"),
    ]


# -- the worker is killed -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [pytest.param("export.begin", marks=pytest.mark.long), "export.written"])
def test_worker_killed_is_replaced_and_the_export_made(
    run_dir: Path, tmp_path: Path, faults: Faults, place: str
) -> None:
    faults.arm(place, "kill")
    with Checkpointer(run_dir, config()) as ckpt:
        ckpt.save(1, state(), export=WeightsExport(tmp_path / "out", **WEIGHTS)).export_completion.result()
        assert faults.fired(place)
    assert_holds(tmp_path / "out", weights(1))
    assert names(tmp_path) == ["faults", "out", "run"]


def test_worker_killed_too_often_fails_the_export_and_the_next_one_is_made(
    run_dir: Path, tmp_path: Path, faults: Faults
) -> None:
    faults.arm("export.written", "kill")
    with Checkpointer(run_dir, config(workers={"max_restarts": 0})) as ckpt:
        handle = ckpt.save(1, state(), export=WeightsExport(tmp_path / "out", **WEIGHTS))
        with pytest.raises(WorkerDiedError, match="SIGKILL"):
            handle.export_completion.result()
        assert handle.upload_completion.result().step == 1
        assert names(tmp_path) == ["faults", "run"]
        ckpt.save(2, state(2), export=WeightsExport(tmp_path / "out", **WEIGHTS)).export_completion.result()
    assert_holds(tmp_path / "out", weights(2))


# -- behind other exports -------------------------------------------------------------------------------------------


def test_saves_go_on_and_retention_leaves_what_is_still_to_be_exported(
    run_dir: Path, tmp_path: Path, faults: Faults
) -> None:
    """1. The first export is held. 2. Later saves are committed, and pruned. 3. Each export has its own step."""
    with Checkpointer(run_dir, config(retention={"keep_latest": 1})) as ckpt:
        with faults.hold("export.begin") as held:
            exports = []
            for step in (1, 2):
                handle = ckpt.save(step, state(step), export=WeightsExport(tmp_path / "hf-{step}", **WEIGHTS))
                exports.append(handle.export_completion)
                handle.upload_completion.result()
            held.wait()
            ckpt.save(3, state(3)).upload_completion.result()
            ckpt.prune()
            assert [info.step for info in ckpt.checkpoints()] == [1, 2, 3]
            assert not any(export.done() for export in exports)
        assert [export.result().step for export in exports] == [1, 2]
        ckpt.prune()
        assert [info.step for info in ckpt.checkpoints()] == [3]
    for step in (1, 2):
        assert_holds(tmp_path / f"hf-{step}", weights(step))


def test_forked_child_holds_no_checkpoint_of_an_export(run_dir: Path, tmp_path: Path, faults: Faults) -> None:
    with Checkpointer(run_dir, config()) as ckpt:
        with faults.hold("export.begin") as held:
            export = ckpt.save(1, state(), export=WeightsExport(tmp_path / "out", **WEIGHTS)).export_completion
            held.wait()
            read, write = os.pipe()
            child = os.fork()
            if child == 0:
                os.close(write)
                os.read(read, 1)  # as long as the parent wants
                os._exit(0)
        export.result()
        ckpt.delete(1)  # nobody reads it
        os.close(write)
        os.close(read)
        assert os.waitpid(child, 0)[1] == 0


def test_checkpoint_that_was_replaced_is_not_exported_under_the_old_step(
    tmp_path: Path, faults: Faults, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with PathCheckpointer(config()) as ckpt:
        with faults.hold("export.begin") as held:
            handles = [
                ckpt.save(out / "last.ckpt", state(n), step=n, export=WeightsExport(out / "hf-{step}", **WEIGHTS))
                for n in (1, 2)
            ]
            held.wait()
            handles[1].upload_completion.result()
        with pytest.raises(CheckpointNotFoundError, match="a later save has replaced the checkpoint"):
            handles[0].export_completion.result()
        assert handles[1].export_completion.result().step == 2
        assert not any("To export them now" in record.message for record in caplog.records)
        ckpt.save(out / "a-7", state(7), export=WeightsExport(out / "hf-{step}", **WEIGHTS))
    assert_holds(out / "hf-2", weights(2))
    assert_holds(out / "hf-7", weights(7))
    assert names(out) == [".stager.lock", "a-7", "hf-2", "hf-7", "last.ckpt"]


@pytest.mark.parametrize("point", ["export.opened", "export.written"])
def test_checkpoint_that_is_replaced_while_its_export_runs_is_exported_whole(
    tmp_path: Path, faults: Faults, point: str
) -> None:
    """The weights and the files of the save are those of one checkpoint."""
    out = tmp_path / "out"
    out.mkdir()
    with PathCheckpointer(config()) as ckpt:
        with faults.hold(point) as held:
            export = WeightsExport(out / "hf-{step}", **WEIGHTS)
            handle = ckpt.save(out / "last.ckpt", state(1), step=1, files={"config.json": b"1"}, export=export)
            held.wait()
            ckpt.save(out / "last.ckpt", state(2), step=2, files={"config.json": b"2"}).upload_completion.result()
        assert handle.export_completion.result().sidecars == ("config.json",)
    assert load_checkpoint(out / "last.ckpt").step == 2
    assert_holds(out / "hf-1", weights(1))
    assert (out / "hf-1" / "config.json").read_bytes() == b"1"


def test_checkpoint_that_is_replaced_when_its_export_begins_is_not_called_damaged(
    tmp_path: Path, faults: Faults, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with PathCheckpointer(config()) as ckpt:
        with faults.hold("export.manifest") as held:
            export = WeightsExport(out / "hf-{step}", **WEIGHTS)
            handle = ckpt.save(out / "last.ckpt", state(1), step=1, files={"config.json": b"1"}, export=export)
            held.wait()
            ckpt.save(out / "last.ckpt", state(2), step=2, files={"config.json": b"2"}).upload_completion.result()
        with pytest.raises(CheckpointNotFoundError, match=r"last\.ckpt: was replaced or removed when its export began"):
            handle.export_completion.result()
    assert names(out) == [".stager.lock", "last.ckpt"]
    assert not any("To export them now" in record.message for record in caplog.records)


def test_export_that_fails_after_its_checkpoint_was_replaced_has_no_command(
    tmp_path: Path, faults: Faults, caplog: pytest.LogCaptureFixture
) -> None:
    """The command would export the later save's weights under the name of the earlier one."""
    out = tmp_path / "out"
    out.mkdir()
    with PathCheckpointer(config()) as ckpt:
        with faults.hold("export.opened") as held:
            export = WeightsExport(out / "hf-{step}", **WEIGHTS, rename=lambda name: name[1000])
            handle = ckpt.save(out / "last.ckpt", state(1), step=1, export=export)
            held.wait()
            ckpt.save(out / "last.ckpt", state(2), step=2).upload_completion.result()
        with pytest.raises(UsageError, match="rename raised IndexError"):
            handle.export_completion.result()
        handle = ckpt.save(
            out / "last.ckpt", state(3), step=3, export=WeightsExport(out / "hf", rename=lambda name: name[1000])
        )
        with pytest.raises(UsageError, match="rename raised IndexError"):
            handle.export_completion.result()
    first, second = (record.message for record in caplog.records if "not exported" in record.message)
    assert "To export them now" not in first
    assert first.endswith(f"they cannot be exported any more: {out / 'last.ckpt'} was replaced or removed meanwhile")
    assert "To export them now" in second  # nobody has replaced this one


def test_export_that_close_gives_up_after_its_checkpoint_was_replaced_has_no_command(
    tmp_path: Path, faults: Faults, caplog: pytest.LogCaptureFixture
) -> None:
    """It waits behind another one when its checkpoint is replaced."""
    out = tmp_path / "out"
    out.mkdir()
    ckpt = PathCheckpointer(config())
    held = faults.hold("export.written")
    for name in ("other", "last"):
        export = WeightsExport(out / f"hf-{name}", **WEIGHTS)
        ckpt.save(out / f"{name}.ckpt", state(1), step=1, export=export).upload_completion.result()
    held.wait()
    ckpt.save(out / "last.ckpt", state(2), step=2).upload_completion.result()
    ckpt.close(timeout=0)
    lines = [record.message for record in caplog.records if "not exported" in record.message]
    assert {"hf-last" in line: "To export them now" in line for line in lines} == {False: True, True: False}


# -- the save ends without a checkpoint -----------------------------------------------------------------------------


def test_save_that_fails_fails_the_export_with_its_error(run_dir: Path, tmp_path: Path, faults: Faults) -> None:
    faults.arm("part.write", "errno ENOSPC")
    with Checkpointer(run_dir, config()) as ckpt:
        handle = ckpt.save(1, state(), export=WeightsExport(tmp_path / "out", **WEIGHTS))
        error = handle.export_completion.exception()
        assert isinstance(error, StorageError)
        with pytest.raises(StorageError):  # nobody has read the save's own yet
            ckpt.close()
    assert handle.upload_completion.exception() is error
    assert names(tmp_path) == ["faults", "run"]


def test_save_whose_checkpoint_is_deleted_cancels_the_export(run_dir: Path, tmp_path: Path, faults: Faults) -> None:
    with Checkpointer(run_dir, config()) as ckpt, faults.hold("part.write") as held:
        handle = ckpt.save(1, state(), export=WeightsExport(tmp_path / "out", **WEIGHTS))
        held.wait()
        deleting = threading.Thread(target=ckpt.delete, args=(1,))
        deleting.start()
        held.release()
        deleting.join()
        assert handle.state is SaveState.CANCELLED
        with pytest.raises(CancelledError):
            handle.export_completion.result()
    assert names(tmp_path) == ["faults", "run"]


def test_save_that_is_skipped_cancels_the_export(run_dir: Path, tmp_path: Path, faults: Faults) -> None:
    with Checkpointer(run_dir, config(arena={"buffers": 2, "when_full": "skip"})) as ckpt:
        with faults.hold("part.write") as held:
            for step in (1, 2):
                ckpt.save(step, state())
            held.wait()
            handle = ckpt.save(3, state(), export=WeightsExport(tmp_path / "out", **WEIGHTS))
            assert handle.state is SaveState.SKIPPED and handle.export_completion.cancelled()


def test_export_that_is_cancelled_before_the_commit_is_not_made(run_dir: Path, tmp_path: Path, faults: Faults) -> None:
    with Checkpointer(run_dir, config()) as ckpt:
        with faults.hold("part.write") as held:
            handle = ckpt.save(1, state(), export=WeightsExport(tmp_path / "out", **WEIGHTS))
            held.wait()
            assert handle.export_completion.cancel()
        assert handle.upload_completion.result().step == 1
    assert names(tmp_path) == ["faults", "run"]


# -- the end --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", ["timeout", "deadline"])
def test_close_gives_up_what_is_not_exported_in_time_and_logs_the_command(
    run_dir: Path, tmp_path: Path, faults: Faults, caplog: pytest.LogCaptureFixture, limit: str
) -> None:
    """One export is under way, and one waits behind it."""
    ckpt = Checkpointer(run_dir, config())
    preemption = ckpt.on_preemption([], deadline_secs=0.0)
    held = faults.hold("export.written")
    handles = [ckpt.save(step, state(step), export=WeightsExport(tmp_path / "hf-{step}", **WEIGHTS)) for step in (1, 2)]
    for handle in handles:
        handle.upload_completion.result()
    held.wait()
    if limit == "deadline":
        preemption.request()
    ckpt.close(timeout=0 if limit == "timeout" else None)
    for handle in handles:
        with pytest.raises(ClosedError, match=r"close\(\) did not wait until the weights of step"):
            handle.export_completion.result()
    assert names(tmp_path) == ["faults", "run"]
    commands = [record.message.partition("now: ")[2] for record in caplog.records if "not exported" in record.message]
    for command in commands:
        assert Outcome(*shlex.split(command)[1:]).code == 0
    for step in (1, 2):
        assert_holds(tmp_path / f"hf-{step}", weights(step))


def test_save_that_is_left_to_the_workers_is_not_exported_and_the_log_says_so(
    run_dir: Path, tmp_path: Path, faults: Faults, caplog: pytest.LogCaptureFixture
) -> None:
    ckpt = Checkpointer(run_dir, config())
    preemption = ckpt.on_preemption([], deadline_secs=0.0)
    with faults.hold("part.write") as held:
        handle = ckpt.save(1, state(), export=WeightsExport(tmp_path / "out", **WEIGHTS))
        held.wait()
        preemption.request()
        ckpt.close()
        with pytest.raises(LeftRunningError, match=r"stager export .*--layout hf --keys model"):
            handle.export_completion.result()
    wait_for_workers_to_end()
    assert load_checkpoint(run_dir / "step-00000001").step == 1
    assert any("did not wait for the commit" in record.message for record in caplog.records)


def test_callback_of_an_export_cannot_save(run_dir: Path, tmp_path: Path) -> None:
    errors: list[BaseException] = []

    def callback(_: object) -> None:
        for call in (lambda: ckpt.save(2, state()), ckpt.close):
            try:
                call()
            except UsageError as error:
                errors.append(error)

    with Checkpointer(run_dir, config()) as ckpt:
        handle = ckpt.save(1, state(), export=WeightsExport(tmp_path / "out", **WEIGHTS))
        handle.export_completion.add_done_callback(callback)
    assert len(errors) == 2 and all("in a callback of a save's Future" in str(error) for error in errors)


TRAINER = """
import sys, torch
from stager import Checkpointer, WeightsExport
ckpt = Checkpointer(sys.argv[1], {"workers": {"count": 1}})
ckpt.save(1, {"model": {"w": torch.ones(500)}}, export=WeightsExport(sys.argv[2], keys="model", strip_prefix="model."))
sys.stdin.read()
"""


@pytest.mark.parametrize(
    "with_worker", [pytest.param(False, marks=pytest.mark.long), True], ids=["alone", "with its worker"]
)
def test_trainer_killed_leaves_a_whole_export_or_none(
    run_dir: Path, tmp_path: Path, faults: Faults, with_worker: bool
) -> None:
    """Killed when all is written, but not in place. The worker that lives goes on; what a dead one left is removed later."""
    out = tmp_path / "out"
    held = faults.hold("export.written")
    command = [sys.executable, "-c", TRAINER, str(run_dir), str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as trainer:
        held.wait()
        workers = psutil.Process(trainer.pid).children()
        trainer.kill()
    assert not out.exists()
    if with_worker:
        for worker in workers:
            worker.send_signal(signal.SIGKILL)
    else:
        held.release()
    psutil.wait_procs(workers)
    assert verify(run_dir / "step-00000001").ok
    if with_worker:
        (left,) = [name for name in names(tmp_path) if name not in ("faults", "run")]
        assert left.startswith("out.export-") and left.endswith(".tmp")
        export_weights(run_dir, out, **WEIGHTS)
    assert_holds(out, {"w": torch.ones(500)})
    assert names(tmp_path) == ["faults", "out", "run"]


def test_what_an_export_under_way_writes_is_not_taken_for_abandoned(
    run_dir: Path, tmp_path: Path, faults: Faults
) -> None:
    with Checkpointer(run_dir, config()) as ckpt:
        with faults.hold("export.written") as held:
            export = ckpt.save(1, state(), export=WeightsExport(tmp_path / "out", **WEIGHTS)).export_completion
            held.wait()
            export_weights(run_dir, tmp_path / "out", **WEIGHTS)
        with pytest.raises(UsageError, match="exists already"):  # who comes second
            export.result()
    assert names(tmp_path) == ["faults", "out", "run"]
    assert_holds(tmp_path / "out", weights(1))


def test_two_ranks_export_once_and_a_refusal_fails_the_save_on_both(tmp_path: Path) -> None:
    first, second = run_ranks("tests.ranks.bodies:save_with_export", 2, tmp_path)
    assert first == [1, "UsageError", 3, True]
    assert second == [None, "RankFailedError", None, True]
    assert not (tmp_path / "run" / "step-00000002").exists()
