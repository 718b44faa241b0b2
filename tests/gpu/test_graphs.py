"""CUDA graphs, which the simulated accelerator does not have: saves between replays, none while one is captured.

Written, and not run yet: no GPU was there.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stager import Checkpointer
from stager.workers.errors import UsageError

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA: nothing else captures graphs")


class Captured:
    """A training step in a graph, over tensors that stay where they are."""

    def __init__(self, ckpt: Checkpointer | None = None) -> None:
        self.model = torch.nn.Linear(64, 64, device="cuda")
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1, capturable=True)
        self._x = torch.randn(8, 64, device="cuda")
        if ckpt is not None:
            ckpt.guard(self.optimizer)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._step()

    def _step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.model(self._x).sum().backward()
        self.optimizer.step()


@pytest.mark.parametrize("guarded", [False, True])
def test_saves_between_replays_hold_what_was_there(run_dir: Path, guarded: bool) -> None:
    with Checkpointer(run_dir) as ckpt:
        captured = Captured(ckpt if guarded else None)
        for step in range(4):
            captured.graph.replay()
            expected = captured.model.weight.detach().clone()
            handle = ckpt.save(step, {"model": captured.model, "optimizer": captured.optimizer})
            for _ in range(3):
                captured.graph.replay()
            handle.upload_completion.result()
            loaded = ckpt.load(step)
            assert loaded is not None
            assert torch.equal(loaded.state["model"]["weight"], expected.cpu())


def test_load_fills_the_tensors_that_the_graph_uses(run_dir: Path) -> None:
    captured = Captured()
    state = {"model": captured.model, "optimizer": captured.optimizer}
    with Checkpointer(run_dir) as ckpt:
        ckpt.save(0, state).upload_completion.result()
        captured.graph.replay()
        expected = captured.model.weight.detach().clone()
        captured.graph.replay()
        ckpt.load(into={"model": captured.model})
        assert not torch.equal(captured.model.weight, expected)
        address = captured.model.weight.data_ptr()
        captured.graph.replay()
    assert captured.model.weight.data_ptr() == address


def test_a_save_inside_of_a_capture_is_refused_and_the_capture_goes_on(run_dir: Path) -> None:
    x = torch.zeros(4, device="cuda")
    with Checkpointer(run_dir) as ckpt:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            x.add_(1)
            with pytest.raises(UsageError, match="recording a graph"):
                ckpt.save(0, {"x": x})
        graph.replay()
    assert torch.all(x == 1)
