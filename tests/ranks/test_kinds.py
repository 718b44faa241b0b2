"""{kinds of sharded tensors} x {2 to 2 ranks, 2 to 1, 1 to 2, one process, stock ``dcp.load``}."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from stager import Checkpointer, UnstageableError
from tests.ranks.kinds import KINDS, WHOLE, mark
from tests.staging.ranks import run_ranks

_KINDS = "tests.ranks.kinds"


def _run(target: str, num_ranks: int, directory: Path) -> list[object]:
    for leftover in [directory / "store", *directory.glob("result-*")]:
        leftover.unlink(missing_ok=True)
    return run_ranks(f"{_KINDS}:{target}", num_ranks, directory)


def _check_whole(directory: Path) -> None:
    """Each tensor is stored once, and whole: for stager, and for a stock ``dcp.load``."""
    expected = WHOLE + 100
    with Checkpointer(directory / "run", read_only=True) as ckpt:
        loaded = ckpt.load(2)
    assert loaded is not None
    stock = {name: torch.zeros_like(expected) for name in KINDS} | {"module": {"weight": torch.zeros_like(expected)}}
    dcp.load(stock, checkpoint_id=str(directory / "run" / "step-00000002"), no_dist=True)
    for state in (loaded.state, stock):
        assert [name for name in KINDS if not torch.equal(state[name], expected)] == []
        assert torch.equal(state["module"]["weight"], expected)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_every_kind_of_two_ranks_is_loaded_on_two_and_on_one(tmp_path: Path) -> None:
    assert _run("save_and_load_kinds", 2, tmp_path) == [[], []]
    assert _run("load_kinds", 1, tmp_path) == [[]]
    _check_whole(tmp_path)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_every_kind_of_one_rank_is_loaded_on_two(tmp_path: Path) -> None:
    _run("save_kinds", 1, tmp_path)
    assert _run("load_kinds", 2, tmp_path) == [[], []]
    _check_whole(tmp_path)


def test_a_sharded_tensor_that_is_not_made_of_boxes_is_refused_with_its_key_path(tmp_path: Path) -> None:
    for said in run_ranks(f"{_KINDS}:refuse_kinds", 2, tmp_path):
        two_parts = (
            "UnstageableError: model['two parts']: is a DTensor whose local tensor is a Wrapped, made of _inner, _s"
        )
        assert said["two parts"].startswith(two_parts)
        assert said["does not fit"].startswith("UnstageableError: model['does not fit']: has global_shape (4, 3)")
        assert "model['overlap']: " in said["overlap"]


_OFFSETS, _SIZES = ((2, 0), (0, 0)), ((2, 3), (2, 3))


def _of_one_process(offsets: Any = _OFFSETS) -> torch.Tensor:
    """Both halves of a whole, the second one first."""
    tensor: torch.Tensor = mark(torch.arange(12.0).reshape(4, 3), (4, 3), offsets, ((0, 0), (2, 0)), _SIZES)
    return tensor


def test_a_process_alone_saves_all_boxes_of_a_tensor_as_one(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, {"workers": {"count": 1}}) as ckpt:
        ckpt.save(1, {"x": _of_one_process()}).upload_completion.result(60)
        loaded = ckpt.load()
        part = mark(torch.zeros(1, 3), (4, 3), ((1, 0),), ((0, 0),), ((1, 3),))
        ckpt.load(into={"x": part})
    assert loaded is not None
    assert loaded.state["x"].tolist() == [[6, 7, 8], [9, 10, 11], [0, 1, 2], [3, 4, 5]]
    assert part.tolist() == [[9, 10, 11]]


@pytest.mark.parametrize("file_format", ["torch", "safetensors"])
def test_a_format_of_whole_tensors_refuses_one_in_several_boxes(file_format: str, tmp_path: Path) -> None:
    config = {"workers": {"count": 1}, "persistence": {"format": file_format}}
    with Checkpointer(tmp_path, config) as ckpt, pytest.raises(UnstageableError, match=r"^x: .* in 2 parts"):
        ckpt.save(1, {"x": _of_one_process()})


def test_a_process_alone_refuses_boxes_that_do_not_make_a_whole(tmp_path: Path) -> None:
    for offsets in ((2, 0), (2, 0)), ((0, 0), (1, 0)):
        with Checkpointer(tmp_path, {"workers": {"count": 1}}) as ckpt, pytest.raises(UnstageableError, match=r"^x: "):
            ckpt.save(1, {"x": _of_one_process(offsets)})


def test_what_is_guarded_is_copied_while_training_goes_on_whatever_its_kind(tmp_path: Path) -> None:
    assert run_ranks(f"{_KINDS}:guarded", 2, tmp_path) == [[], []]
