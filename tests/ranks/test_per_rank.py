"""``PerRank`` in one process, which is rank 0."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stager import Checkpointer, PerRank, StateMismatchError, UnstageableError


class Loader:
    """Its state is a mapping, or what it was made with."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


def test_values_objects_and_lists_come_back(run_dir: Path) -> None:
    with Checkpointer(run_dir) as ckpt:
        state = {"a": PerRank(7), "l": [PerRank(torch.ones(2)), 5], "o": PerRank(Loader({"position": 3}))}
        ckpt.save(1, state).upload_completion.result()
        target = {"a": PerRank(0), "l": [PerRank(torch.zeros(2)), 0], "o": PerRank(Loader({"position": 0}))}
        tensor, loader = target["l"][0].value, target["o"].value
        loaded = ckpt.load(into=target)
        whole = ckpt.load()
    assert loaded is not None and whole is not None
    assert (target["a"].value, target["l"][1]) == (7, 5)
    assert tensor.eq(1).all()
    assert loader.state == {"position": 3}
    assert whole.state["a"] == {"rank-0": 7}


def test_a_rank_that_the_checkpoint_has_nothing_of_keeps_what_it_has(
    run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Checkpointer(run_dir) as ckpt:
        ckpt.save(1, {"a": {"rank-1": 1}}).upload_completion.result()
        target = {"a": PerRank(5)}
        ckpt.load(into=target)
    assert target["a"].value == 5
    assert "a: the checkpoint has no PerRank value of rank 0" in caplog.text


def test_what_was_not_per_rank_when_it_was_saved_does_not_fit(run_dir: Path) -> None:
    with Checkpointer(run_dir) as ckpt:
        ckpt.save(1, {"a": {"x": 1}}).upload_completion.result()
        with pytest.raises(StateMismatchError, match="a: is a PerRank in the target and"):
            ckpt.load(into={"a": PerRank({"x": 0})})


@pytest.mark.parametrize("inner", [{"position": PerRank(3)}, {"deep": [{"x": PerRank(torch.ones(1))}]}, PerRank(3)])
def test_inside_the_state_of_an_object_it_is_refused(inner: Any, run_dir: Path) -> None:
    with Checkpointer(run_dir) as ckpt:
        with pytest.raises(UnstageableError, match="PerRank value inside the state of a Loader"):
            ckpt.save(1, {"loader": Loader(inner)})
        ckpt.save(2, {"loader": PerRank(Loader({"x": 1})), "after": PerRank(1)}).upload_completion.result()
