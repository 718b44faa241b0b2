"""A run in an object store, as a trainer has it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from typer.testing import CliRunner

from stager import (
    Checkpointer,
    ConfigError,
    DirectoryInUseError,
    PathCheckpointer,
    StagerStorageReader,
    export_checkpoint,
    load_checkpoint,
    prune,
    recover,
    verify,
)
from stager.cli.app import app
from stager.workers.checkpoint.storage.objects.client import split
from stager.workers.errors import CheckpointNotFoundError, CorruptCheckpointError
from tests.states import same

LEFT = re.compile(r"^\.stager\.(?:decisions|removing)|receipt-|/save-|\.data-[0-9a-f]+/manifest")
"""Keys of a run that no commit and no removal leaves."""


def state_of(step: int) -> dict[str, object]:
    torch.manual_seed(step)
    weight = torch.randn(700, 500)
    return {
        "model": {
            "weight": weight,
            "tied": weight,
            "half": torch.randn(33).to(torch.bfloat16),
            "empty": torch.empty(0),
        },
        "many": [torch.full((7,), float(number)) for number in range(300)],
        "step": step,
    }


def objects(run_url: str) -> list[str]:
    """The keys of a run's objects, without the run."""
    client, root = split(run_url)
    return [found.key[len(root) + 1 :] for found in client.walk(root)]


def test_what_is_saved_is_loaded_by_the_next_run(run_url: str) -> None:
    with Checkpointer(run_url) as ckpt:
        assert ckpt.load() is None
        for step in (1, 2):
            save = ckpt.save(step, state_of(step), files={"config.json": b"{}"}, metrics={"loss": 1.0 / step})
        info = save.upload_completion.result()
        assert info.path == f"{run_url}/step-00000002" and info.metrics == {"loss": 0.5}
    with Checkpointer(run_url) as ckpt:
        loaded = ckpt.load()
        assert loaded is not None and loaded.step == 2 and same(loaded.state, state_of(2))
        assert loaded.files["config.json"] == b"{}"
        first = ckpt.load(1)
        assert first is not None and same(first.state, state_of(1))
        assert [found.step for found in ckpt.checkpoints()] == [1, 2]
    for step in (1, 2):
        assert verify(f"{run_url}/step-{step:08d}").ok


@pytest.mark.parametrize("kind", ["dcp", "torch", "safetensors"])
def test_every_format(run_url: str, kind: str) -> None:
    with Checkpointer(run_url, config={"persistence": {"format": kind}}) as ckpt:
        ckpt.save(5, state_of(5))
    loaded = load_checkpoint(f"{run_url}/step-00000005")
    assert same(loaded.state, state_of(5))


def test_only_what_belongs_to_checkpoints_is_left(run_url: str) -> None:
    with Checkpointer(run_url, config={"retention": {"keep_latest": 2}}) as ckpt:
        for step in range(5):
            ckpt.save(step, state_of(step)).upload_completion.result()
        ckpt.save(4, state_of(40)).upload_completion.result()  # takes the place of the other one
        assert [found.step for found in ckpt.checkpoints()] == [3, 4]
        replaced = ckpt.load(4)
        assert replaced is not None and same(replaced.state, state_of(40))
        assert ckpt.delete(3).steps  # a report
    keys = objects(run_url)
    data = {key.split("/")[0] for key in keys if ".data-" in key}
    assert len(data) == 1 and data.pop().startswith("step-00000004.data-")
    assert {key for key in keys if ".data-" not in key} == {"step-00000004/manifest.json", ".stager.lock"}
    assert not any(map(LEFT.search, keys))


def test_protected_steps_stay(run_url: str) -> None:
    with Checkpointer(run_url, config={"retention": {"keep_latest": 1}}) as ckpt:
        ckpt.save(1, state_of(1)).upload_completion.result()
        ckpt.protect(1)
        for step in (2, 3):
            ckpt.save(step, state_of(step)).upload_completion.result()
    assert names(run_url) == ["step-00000001", "step-00000003"]
    report = prune(run_url, keep_latest=1, protect=[1])
    assert not report.damaged and names(run_url) == ["step-00000001", "step-00000003"]


def names(run_url: str) -> list[str]:
    return sorted({key.split("/")[0] for key in objects(run_url) if key.endswith("/manifest.json")})


def test_another_run_is_kept_out_and_told_by_whom(run_url: str) -> None:
    with Checkpointer(run_url), pytest.raises(DirectoryInUseError, match="this process has it open already"):
        Checkpointer(run_url)
    Checkpointer(run_url).close()


def test_a_path_checkpointer_writes_where_it_is_told(run_url: str) -> None:
    with PathCheckpointer() as ckpt:
        ckpt.save(f"{run_url}/a/last.ckpt", state_of(1), step=1).upload_completion.result()
        ckpt.save(f"{run_url}/a/last.ckpt", state_of(2), step=2).upload_completion.result()
        ckpt.save(f"{run_url}/b/best", state_of(3), step=3).upload_completion.result()
        loaded = ckpt.load(f"{run_url}/a/last.ckpt")
        assert loaded is not None and same(loaded.state, state_of(2))
        ckpt.delete(f"{run_url}/b/best")
    assert same(load_checkpoint(f"{run_url}/a/last.ckpt").state, state_of(2))
    with pytest.raises(CheckpointNotFoundError):
        load_checkpoint(f"{run_url}/b/best")


def test_a_damaged_object_is_found_and_the_checkpoint_before_it_is_loaded(run_url: str) -> None:
    with Checkpointer(run_url) as ckpt:
        for step in (1, 2):
            ckpt.save(step, state_of(step)).upload_completion.result()
    client, root = split(run_url)
    key = next(key for key in objects(run_url) if key.startswith("step-00000002.data-") and "__0_0.distcp/" in key)
    data = bytearray(client.get(f"{root}/{key}"))
    data[len(data) // 2] ^= 1
    client.put(f"{root}/{key}", bytes(data))
    report = verify(f"{run_url}/step-00000002")
    assert not report.ok and "__0_0.distcp" in report.problems[0]
    with Checkpointer(run_url, read_only=True) as ckpt:
        loaded = ckpt.load()
        assert loaded is not None and loaded.step == 1
    client.delete([f"{root}/{key}"])
    with pytest.raises(CorruptCheckpointError):
        load_checkpoint(f"{run_url}/step-00000002")


def test_torch_loads_it_through_the_storage_reader(run_url: str) -> None:
    with Checkpointer(run_url) as ckpt:
        ckpt.save(1, {"weight": torch.arange(1000.0)})
    target = {"weight": torch.zeros(1000)}
    with pytest.warns(UserWarning, match="single process"):
        dcp.load(target, storage_reader=StagerStorageReader(f"{run_url}/step-00000001"))
    assert torch.equal(target["weight"], torch.arange(1000.0))


def test_export_writes_a_file_here(run_url: str, tmp_path: Path) -> None:
    with Checkpointer(run_url) as ckpt:
        ckpt.save(1, state_of(1))
    export_checkpoint(f"{run_url}/step-00000001", tmp_path / "state.pt")
    assert same(torch.load(tmp_path / "state.pt", weights_only=True), state_of(1))


@pytest.mark.parametrize("command", [["ls"], ["verify"], ["inspect"], ["recover"], ["prune", "--keep-latest", "1"]])
def test_commands_take_the_url(run_url: str, command: list[str]) -> None:
    with Checkpointer(run_url) as ckpt:
        for step in (1, 2):
            ckpt.save(step, state_of(step)).upload_completion.result()
    result = CliRunner().invoke(app, [command[0], run_url, *command[1:]], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    listed = json.loads(CliRunner().invoke(app, ["ls", run_url, "--json"]).stdout)
    steps = [row["step"] for row in listed["checkpoints"]]
    assert steps == ([2] if command[0] == "prune" else [1, 2])


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"persistence": {"incremental": True}}, "persistence.incremental"),
        ({"replication": {"partners": 1}}, "partners"),
    ],
)
def test_what_an_object_store_cannot_do_is_refused(run_url: str, config: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        Checkpointer(run_url, config=config)


def test_nothing_there(run_url: str) -> None:
    with pytest.raises(CheckpointNotFoundError):
        load_checkpoint(f"{run_url}/step-00000001")
    with pytest.raises(CheckpointNotFoundError):
        recover(run_url)
    with Checkpointer(run_url, read_only=True) as ckpt:
        assert ckpt.load() is None and ckpt.checkpoints() == []
