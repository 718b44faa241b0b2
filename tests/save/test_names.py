"""``persistence.name``: what the directories of checkpoints are called; and that others are read whatever their names."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from stager import (
    Checkpointer,
    ConfigError,
    CorruptCheckpointError,
    PruneFate,
    load_checkpoint,
    prune,
    verify,
)
from stager.workers.checkpoint.documents.names import (
    check_template,
    checkpoint_name,
    is_partial,
    may_be_checkpoint,
    not_a_checkpoint_name,
    parse_partial,
    parse_unfinished,
    partial_name,
    removing_name,
    unfinished_name,
)
from tests.cli.conftest import Outcome


def config(name: str | None = None, **persistence: Any) -> dict[str, Any]:
    named = {} if name is None else {"name": name}
    return {"workers": {"count": 1}, "persistence": {"fsync": False, **named, **persistence}}


def save(directory: Path, name: str | None, *steps: int, **options: Any) -> None:
    with Checkpointer(directory, {**config(name), **options}) as ckpt:
        for step in steps:
            ckpt.save(step, {"x": torch.full((9,), float(step))}).upload_completion.result()


@pytest.mark.parametrize(
    "name", ["checkpoint-{step}", "step-{step}", "epoch_{step:05d}.ckpt", "größe={step}", "{step}"]
)
def test_a_run_has_the_names_that_were_asked_for_and_is_read_without_the_setting(run_dir: Path, name: str) -> None:
    save(run_dir, name, 7, 100)
    names = {checkpoint_name(step, name) for step in (7, 100)}
    assert {entry for entry in os.listdir(run_dir) if not entry.startswith(".")} == names
    with Checkpointer(run_dir, read_only=True) as ckpt:
        assert [(info.step, os.path.basename(info.path)) for info in ckpt.checkpoints()] == [
            (step, checkpoint_name(step, name)) for step in (7, 100)
        ]
        assert ckpt.load().step == 100
        for which in (7, checkpoint_name(7, name), run_dir / checkpoint_name(7, name), ckpt.checkpoints()[0]):
            assert torch.equal(ckpt.load(which).state["x"], torch.full((9,), 7.0))
    assert verify(run_dir / checkpoint_name(7, name)).ok
    assert Outcome("ls", run_dir).code == 0
    assert Outcome("verify", "--all", run_dir).code == 0
    assert Outcome("inspect", run_dir, "--step", 7).code == 0


def test_names_of_several_kinds_are_one_run_and_the_later_one_of_a_step_counts(run_dir: Path) -> None:
    save(run_dir, None, 1, 3)
    save(run_dir, "checkpoint-{step}", 2, 3)
    with Checkpointer(run_dir, read_only=True) as ckpt:
        names = [os.path.basename(info.path) for info in ckpt.checkpoints()]
        assert names == ["step-00000001", "checkpoint-2", "checkpoint-3"]


def test_retention_and_delete_see_every_name(run_dir: Path) -> None:
    save(run_dir, None, 1)
    save(run_dir, "checkpoint-{step}", 2, 3, 4)
    assert prune(run_dir, keep_latest=2).steps(PruneFate.REMOVED) == [2, 1]
    with Checkpointer(run_dir, {**config("checkpoint-{step}"), "retention": {"keep_latest": 1}}) as ckpt:
        ckpt.protect(3)
        ckpt.save(5, {"x": torch.ones(3)}).upload_completion.result()
    assert {name for name in os.listdir(run_dir) if not name.startswith(".")} == {"checkpoint-3", "checkpoint-5"}


def test_incremental_saves_link_whatever_the_names(run_dir: Path) -> None:
    state = {"frozen": torch.ones(1 << 19), "x": torch.zeros(1)}
    for name, linked in ((None, False), ("checkpoint-{step}", True), ("{step}", True)):
        with Checkpointer(run_dir, config(name, incremental=True)) as ckpt:
            if linked:
                ckpt.load()
            step = len(os.listdir(run_dir))
            info = ckpt.save(step, state).upload_completion.result()
            assert (info.linked_bytes > 0) is linked


def test_a_copy_or_a_renamed_one_does_not_count(run_dir: Path) -> None:
    save(run_dir, "checkpoint-{step}", 1, 2)
    (run_dir / "checkpoint-2").rename(run_dir / "checkpoint-2.bad")
    (run_dir / "best").symlink_to("checkpoint-1")
    with Checkpointer(run_dir, read_only=True) as ckpt:
        assert [info.step for info in ckpt.checkpoints()] == [1]
        assert ckpt.load().step == 1
    assert load_checkpoint(run_dir / "checkpoint-2.bad").step == 2  # by its path it is read


@pytest.mark.parametrize("damage", ["head", "seal", "lost", "empty"])
def test_a_damaged_manifest_does_not_make_one_vanish(
    run_dir: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(run_dir, "checkpoint-{step}", 1, 2)
    save(run_dir, "checkpoint-{step}", 2)
    manifest = run_dir / "checkpoint-2" / "manifest.json"
    data = bytearray(manifest.read_bytes())
    if damage == "lost":
        manifest.unlink()
    elif damage == "empty":
        manifest.write_bytes(b"")
    else:
        data[data.index(b'"format"') + 2 if damage == "head" else 20] ^= 1
        manifest.write_bytes(data)
    with Checkpointer(run_dir, read_only=True) as ckpt:
        assert ckpt.load().step == 1
        assert [one.name for one in ckpt.skipped] == ["checkpoint-2"]
        with pytest.raises(CorruptCheckpointError, match="checkpoint-2"):
            ckpt.load(2)
    assert "checkpoint-2 skipped" in caplog.text
    assert Outcome("verify", "--all", run_dir).code == 1


def test_the_directories_of_others_are_not_looked_into(run_dir: Path) -> None:
    save(run_dir, "checkpoint-{step}", 1)
    for name in ("logs-5", "checkpoint-9", "wandb"):
        (run_dir / name).mkdir()
    (run_dir / "wandb" / "manifest.json").write_text('{"format": "another"}')
    (run_dir / "checkpoint-9" / "model.safetensors").write_bytes(b"x")
    (run_dir / "checkpoint-7").write_text("a file")
    with Checkpointer(run_dir, read_only=True) as ckpt:
        assert [info.step for info in ckpt.checkpoints()] == [1] and not ckpt.skipped


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("checkpoint", "must have {step} in it"),
        ("{step}-{step}", "must have {step} in it"),
        ("{epoch}", "must have {step} in it"),
        ("a/{step}", "without /"),
        (".{step}", "begin with a dot"),
        ("{step:x}", "takes a step as"),
        ("{step!r}", "takes a step as"),
        ("{step:8d}", "takes a step as"),
        ("{step", "is no template"),
        ("s.partial-{step}", "no checkpoints"),
        ("x" * 200 + "{step}", "more than 200 bytes"),
        ("step-1{step:07d}", "default name of step"),
    ],
)
def test_a_bad_template_is_refused_with_the_key(run_dir: Path, name: str, why: str) -> None:
    with pytest.raises(ConfigError, match=r"persistence\.name") as raised:
        Checkpointer(run_dir, config(name))
    assert why in str(raised.value)
    assert not run_dir.exists()


@pytest.mark.parametrize(
    "name",
    ["step-00000100", "checkpoint-1", "a.b", "best=0.1", "ü", "x.partial", "step-5", "step-~5", "a-step-5.step-6"],
)
def test_what_is_partial_is_known_by_any_name(name: str) -> None:
    partial = partial_name(name, "0123456789abcdef")
    assert (
        is_partial(partial)
        and is_partial(f"{partial}.replaced")
        and parse_partial(partial) == (name, "0123456789abcdef")
    )
    assert may_be_checkpoint(name) and not may_be_checkpoint(partial)
    assert not is_partial(name)


@pytest.mark.parametrize("name", ["step-5", "step-~~5", "epoch-1-step-5.ckpt", "step-step-5"])
def test_nothing_that_is_no_checkpoint_has_step_and_a_number_in_its_name(name: str) -> None:
    """torchtitan takes such a directory for that step's, wherever in the name it is."""
    nonce = "0123456789abcdef"
    for named in (partial_name, removing_name, unfinished_name, not_a_checkpoint_name):
        assert re.search(r"step-(\d+)", named(name, nonce)) is None
    assert parse_partial(partial_name(name, nonce)) == (name, nonce)
    assert parse_unfinished(unfinished_name(name, nonce)) == (name, nonce)


def test_every_allowed_template_gives_each_step_a_name_of_its_own() -> None:
    for template in ("step-{step:08d}", "{step}", "{step:020d}", "a-{step:d}-b"):
        check_template(template)
        names = {checkpoint_name(step, template) for step in (0, 1, 10, 11, 101, 10**8, 10**9, 2**63 - 1)}
        assert len(names) == 8


def test_the_default_name_is_not_in_the_manifest_so_that_version_0_1_reads_it(run_dir: Path) -> None:
    save(run_dir, None, 1)
    body = json.loads((run_dir / "step-00000001" / "manifest.json").read_bytes())["body"]
    assert "name" not in body and "sidecars" not in body
