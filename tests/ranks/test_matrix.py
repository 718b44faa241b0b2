"""{layouts} x {save, load the same, load resharded, stock dcp.load}, each rank a process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from stager import Checkpointer
from tests.ranks.layouts import LAYOUTS, build, differences, whole_state
from tests.staging.ranks import run_ranks

NUM_RANKS = {"plain": 2, "ddp": 2, "fsdp": 2, "tp": 2, "fsdp+tp": 4, "replicated tp": 4, "hsdp": 4}
RESHARDED = {
    "plain": ("fsdp", 3),
    "ddp": ("fsdp", 2),
    "fsdp": ("tp", 2),
    "tp": ("fsdp", 3),
    "fsdp+tp": ("fsdp", 2),
    "replicated tp": ("ddp", 2),
    "hsdp": ("fsdp+tp", 4),
}


def _run(target: str, num_ranks: int, directory: Path, *args: object) -> list[object]:
    for leftover in [directory / "store", *directory.glob("result-*")]:
        leftover.unlink(missing_ok=True)
    return run_ranks(f"tests.ranks.bodies:{target}", num_ranks, directory, *args)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(
    "layout",
    [layout if NUM_RANKS[layout] == 4 else pytest.param(layout, marks=pytest.mark.long) for layout in LAYOUTS],
)
def test_every_layout_is_saved_and_loaded_in_every_way(layout: str, tmp_path: Path) -> None:
    num_ranks = NUM_RANKS[layout]
    (tmp_path / "ranks").write_text(str(num_ranks))
    assert _run("save_and_load", num_ranks, tmp_path, layout) == [[]] * num_ranks
    other, other_ranks = RESHARDED[layout]
    assert _run("load_resharded", other_ranks, tmp_path, other) == [[]] * other_ranks
    _check_in_one_process(tmp_path)


def _check_in_one_process(directory: Path) -> None:
    """Whole, by stager and by stock ``dcp.load``, into a model and into nothing."""
    expected = torch.load(directory / "expected.pt")
    trained = build("plain", seed=11)
    with Checkpointer(directory / "run") as ckpt:
        assert ckpt.load(into={"model": trained[0], "optimizer": trained[1]}) is not None
        assert differences(expected, whole_state(trained)) == []
        loaded = ckpt.load()
    assert loaded is not None
    assert differences(expected["model"], dict(loaded.state["model"])) == []
    assert loaded.state["step"] == 7
    assert loaded.state["own"]["rank-1"]["rank"] == 1
    model, optimizer = build("plain", seed=11)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    dcp.load(state, checkpoint_id=str(directory / "run" / "step-00000007"), no_dist=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    assert differences(expected, whole_state((model, optimizer))) == []
