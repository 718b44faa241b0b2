"""The format of an exported file: the ending of its name, and ``file_format``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stager import UsageError, export_checkpoint
from stager.exporting.file_format import format_of
from tests.persistence.tasks import save


@pytest.mark.parametrize("name", ["a.pt", "a.pth", "a.bin", "a.ckpt", "a.v2.PT"])
def test_endings_of_torch(name: str) -> None:
    assert format_of(f"/d.safetensors/{name}", None) == format_of(name, "torch") == "torch"
    with pytest.raises(UsageError, match=r"is that of the format torch, and file_format .* is safetensors; change one"):
        format_of(name, "safetensors")


def test_ending_of_safetensors() -> None:
    assert format_of("a.safetensors", None) == format_of("a.safetensors", "safetensors") == "safetensors"
    with pytest.raises(UsageError, match=r"is that of the format safetensors, and file_format .* is torch; change one"):
        format_of("a.safetensors", "torch")


@pytest.mark.parametrize(("name", "what"), [("a.h5", "the ending .h5"), ("pt", "a name without an ending")])
def test_ending_that_tells_nothing_needs_the_format(name: str, what: str) -> None:
    with pytest.raises(UsageError, match=f"{what} does not tell the format; .* or give file_format"):
        format_of(name, None)
    assert format_of(name, "torch") == "torch"


def test_unknown_format_is_named_with_the_known() -> None:
    with pytest.raises(UsageError, match=r"unknown format 'hdf5'; known: torch, safetensors"):
        format_of("a.pt", "hdf5")


def test_file_is_what_its_name_says(run_dir: Path, tmp_path: Path) -> None:
    state = {"w": torch.arange(3.0)}
    info = save(run_dir, state)
    assert export_checkpoint(info.path, tmp_path / "w.safetensors").format == "safetensors"
    assert load_file(tmp_path / "w.safetensors")["w"].equal(state["w"])
    assert export_checkpoint(info.path, tmp_path / "w.pth").format == "torch"
    assert torch.load(tmp_path / "w.pth")["w"].equal(state["w"])
