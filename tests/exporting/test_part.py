"""Which checkpoint is exported, and which part of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, load_model
from torch import nn

from stager import CheckpointNotFoundError, StateMismatchError, UsageError, export_checkpoint
from tests.exporting.sharded import chunked_checkpoint
from tests.persistence.tasks import save


def trained() -> tuple[nn.Sequential, dict[str, Any]]:
    """A model with parameters, buffers and tied weights; and a state with it and its optimizer."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4, bias=False))
    model[2].weight = model[0].weight
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(8, 4)).sum().backward()
    optimizer.step()
    return model, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}


def other() -> nn.Sequential:
    """Like ``trained()``, with other values."""
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4, bias=False))


def equal(one: nn.Module, two: nn.Module) -> bool:
    values = two.state_dict()
    return all(value.equal(values[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_alone_go_straight_into_a_model(run_dir: Path, tmp_path: Path, name: str, prefix: str) -> None:
    model, state = trained()
    state["model"] = {prefix + key: value for key, value in state["model"].items()}
    save(run_dir, state)
    out = tmp_path / name
    result = export_checkpoint(run_dir, out, keys="model", strip_prefix=f"model.{prefix}")
    plain = other()
    if name.endswith(".safetensors"):
        assert "2.weight" not in load_file(out)  # safetensors has tied weights once
        plain[2].weight = plain[0].weight
        load_model(plain, out)
    else:
        plain.load_state_dict(torch.load(out))
    assert equal(model, plain)
    assert (result.num_objects, result.left_out) == (0, ())


def test_weights_alone_in_safetensors_need_no_helper(run_dir: Path, tmp_path: Path) -> None:
    model, out = nn.Linear(4, 4), tmp_path / "w.safetensors"
    save(run_dir, {"model": model, "step": 3})
    export_checkpoint(run_dir, out, keys="model", strip_prefix="model.")
    plain = nn.Linear(4, 4)
    plain.load_state_dict(load_file(out))
    assert equal(model, plain)


def test_part_of_a_checkpoint_in_chunks(tmp_path: Path) -> None:
    path, whole = chunked_checkpoint(tmp_path)
    name = next(iter(whole))
    export_checkpoint(path, tmp_path / "a.safetensors", keys=name)
    loaded = load_file(tmp_path / "a.safetensors")
    assert list(loaded) == [name] and loaded[name].equal(whole[name])


def test_objects_that_are_left_out_are_those_of_the_part(run_dir: Path, tmp_path: Path) -> None:
    save(run_dir, {"model": {"w": torch.ones(2), "version": "a"}, "epoch": 3})
    result = export_checkpoint(run_dir, tmp_path / "a.safetensors", keys=["model"])
    assert result.left_out == ("model['version']",)
    export_checkpoint(run_dir, tmp_path / "a.pt", keys=["model.w", "epoch"])
    assert sorted(torch.load(tmp_path / "a.pt")) == ["epoch", "model"]
    assert list(torch.load(tmp_path / "a.pt")["model"]) == ["w"]


@pytest.mark.parametrize(
    ("keys", "strip_prefix", "says"),
    [
        ("modle", None, r"no key matches keys='modle'; nothing was done\. Similar names: model"),
        (["model", "x"], None, r"no key matches keys='x'"),
        (None, "model.", r"begins with strip_prefix='model\.'; .*pass keys='model', strip_prefix='model\.'"),
        ("model", "model", r"the names in model begin with 'model\.'; pass strip_prefix='model\.'$"),
        ("model", "module.", r"begins with strip_prefix='module\.'; .*its top are model; stager inspect lists"),
        ("model", "model.module.", r"begins with strip_prefix='model\.module\.'; .* pass strip_prefix='model\.'$"),
    ],
)
def test_what_fits_nothing_is_said_and_nothing_is_written(
    run_dir: Path, tmp_path: Path, keys: Any, strip_prefix: str | None, says: str
) -> None:
    save(run_dir, trained()[1])
    with pytest.raises(StateMismatchError, match=says):
        export_checkpoint(run_dir, tmp_path / "a.pt", keys=keys, strip_prefix=strip_prefix)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_run_means_its_newest_checkpoint_and_step_another(run_dir: Path, tmp_path: Path) -> None:
    for step in (9, 10):
        info = save(run_dir, {"n": torch.tensor(step)}, step=step)
    assert export_checkpoint(run_dir, tmp_path / "a.pt").step == 10
    assert export_checkpoint(run_dir, tmp_path / "b.pt", step=np.int64(9)).step == 9
    assert torch.load(tmp_path / "b.pt")["n"] == 9
    with pytest.raises(CheckpointNotFoundError, match=r"no checkpoint of step 11; there are steps 10, 9"):
        export_checkpoint(run_dir, tmp_path / "c.pt", step=11)
    with pytest.raises(UsageError, match=r"is one checkpoint; leave the step out"):
        export_checkpoint(info.path, tmp_path / "c.pt", step=10)
    with pytest.raises(CheckpointNotFoundError, match="is an empty directory"):
        (tmp_path / "empty").mkdir()
        export_checkpoint(tmp_path / "empty", tmp_path / "c.pt")
