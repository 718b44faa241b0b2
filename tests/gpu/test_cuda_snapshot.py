"""Snapshots of CUDA tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from stager import Checkpointer
from tests.observed import slab_ranges
from tests.states import same

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def device() -> str:
    return "cuda"


def slabs() -> Iterator[torch.Tensor]:
    """The bytes of each slab that this process has mapped."""
    for begin, end in slab_ranges():
        yield torch.frombuffer((ctypes.c_char * (end - begin)).from_address(begin), dtype=torch.uint8)


def test_kernels_queued_before_save_are_in_the_snapshot_and_later_ones_are_not(run_dir: Path, device: str) -> None:
    tensor = torch.zeros(64 << 20 if device == "cuda" else 1000, device=device)
    with Checkpointer(run_dir) as ckpt:
        for step in range(5):
            for _ in range(50):
                tensor.add_(1)
            handle = ckpt.save(step, {"x": tensor})
            for _ in range(50):
                tensor.add_(1)
            handle.upload_completion.result()
            loaded = ckpt.load(step)
            assert loaded is not None
            assert torch.all(loaded.state["x"] == 100 * step + 50)


def test_tied_viewed_and_strided_cuda_tensors_round_trip(run_dir: Path, device: str) -> None:
    base = torch.randn(64, 32, device=device)
    state = {"a": base, "b": base.t(), "c": base[3:9], "d": base[:, 5], "e": torch.complex(base, base).conj()}
    with Checkpointer(run_dir, {"staging": {"verify": True}}) as ckpt:
        ckpt.save(0, state).upload_completion.result()
        loaded = ckpt.load()
        assert loaded is not None and same(loaded.state, {name: tensor.cpu() for name, tensor in state.items()})
        into = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        ckpt.load(into=into)
    assert same({k: v.cpu() for k, v in into.items()}, {k: v.cpu() for k, v in state.items()})


def test_buffers_are_pinned_and_workers_have_no_cuda_context(run_dir: Path, device: str) -> None:
    state = {"x": torch.randn(1 << 20, device=device)}
    with Checkpointer(run_dir) as ckpt:
        ckpt.warmup(state)
        ckpt.save(0, state).upload_completion.result()
        found = list(slabs())
        assert sum(slab.numel() for slab in found) >= 2 * state["x"].nbytes
        for slab in found:
            assert slab[0].is_pinned() is slab[-1].is_pinned() is (device == "cuda")
        del found
        for child in psutil.Process().children():
            assert not any("nvidia" in mapping.path for mapping in child.memory_maps())


def test_guarded_cuda_training_saves_the_values_from_before_the_step(run_dir: Path, device: str) -> None:
    model = torch.nn.Linear(512, 512, device=device)
    optimizer = torch.optim.AdamW(model.parameters())
    with Checkpointer(run_dir) as ckpt:
        ckpt.guard(optimizer)
        for step in range(5):
            model(torch.randn(64, 512, device=device)).sum().backward()
            optimizer.step()
            expected = {k: v.clone() for k, v in model.state_dict().items()}
            handle = ckpt.save(step, {"model": model, "optimizer": optimizer})
            model(torch.randn(64, 512, device=device)).sum().backward()
            optimizer.step()
            handle.upload_completion.result()
            loaded = ckpt.load(step)
            assert loaded is not None and same(dict(loaded.state["model"]), {k: v.cpu() for k, v in expected.items()})
