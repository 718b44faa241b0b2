"""Incremental saves in the other formats, and from copies that the workers took."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from stager import Checkpointer, ConfigError
from stager.config import load_config
from stager.workers.checkpoint.formats import FORMATS
from stager.workers.checkpoint.read.verify import verify_checkpoint
from tests.formats.stock import read_stock
from tests.incremental.states import frozen_and_adapter, save_incrementally, shared_files
from tests.persistence.tasks import load, make_task, run
from tests.states import same


def test_safetensors_links_what_is_frozen_and_stock_reads_it_after_the_first_is_deleted(
    run_dir: Path, tmp_path: Path
) -> None:
    first = save_incrementally(run_dir, 1.0, 1, None, kind="safetensors")
    second = save_incrementally(run_dir, 2.0, 2, 1, kind="safetensors")
    assert shared_files(first.path, second.path) == [f"state-{n:05d}-of-00003.safetensors" for n in (1, 2)]
    shutil.rmtree(first.path)
    assert verify_checkpoint(second.path).ok and same(load(second), frozen_and_adapter(2.0))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    read = read_stock("safetensors", second.path, elsewhere)["tensors"]
    layers = frozen_and_adapter(2.0)["layers"].items()
    expected = {f"layers.{i}.{name}": tensor for i, layer in layers for name, tensor in layer.items()}
    assert same({name: read[name] for name in expected}, expected) and len(read) == len(expected)


def test_safetensors_of_mixed_sizes_within_a_role_are_aligned(run_dir: Path) -> None:
    dtypes = (torch.int8, torch.float64, torch.bfloat16, torch.float32)
    state = {str(i): torch.ones(20_001, dtype=dtypes[i % 4]) for i in range(8)}
    state["empty"] = torch.ones(0, 3)
    run_dir.mkdir()
    for step, base in ((1, None), (2, 1)):
        job = make_task(run_dir, state, kind="safetensors", step=step, incremental=True, base_step=base)
        info = run(job).info
        assert verify_checkpoint(info.path).ok and same(load(info), state)
    assert info.linked_bytes > 0.99 * info.nbytes - 10_000  # all but index and manifest


def test_another_format_than_before_is_written_in_full(run_dir: Path) -> None:
    save_incrementally(run_dir, 1.0, 1, None)
    second = save_incrementally(run_dir, 1.0, 2, 1, kind="safetensors")
    assert second.linked_bytes == 0 and verify_checkpoint(second.path).ok


@pytest.mark.parametrize("kind", FORMATS)
def test_a_format_of_one_file_is_refused(kind: str) -> None:
    config = {"persistence": {"format": kind, "incremental": True}}
    if not FORMATS[kind].one_file:
        assert load_config(config).persistence.incremental
        return
    with pytest.raises(ConfigError, match=rf"persistence: incremental saves reuse .* format \"{kind}\" writes one"):
        load_config(config)


@pytest.mark.parametrize("kind", ["dcp", pytest.param("safetensors", marks=pytest.mark.long)])
def test_what_workers_copied_is_linked(run_dir: Path, kind: str) -> None:
    """Frozen and trained tensors in shared memory; the trained one is changed in place."""
    config = {
        "workers": {"count": 2},
        "staging": {"location": "workers", "share_min_bytes": "64KiB"},
        "persistence": {"incremental": True, "format": kind, "fsync": False},
    }
    state = {"frozen": torch.rand(300_000), "trained": torch.rand(100_000), "step": 1}
    with Checkpointer(run_dir, config) as ckpt:
        ckpt.save(1, state).upload_completion.result()
        state["trained"][-1] = 7.0
        info = ckpt.save(2, state).upload_completion.result()
        assert 1_200_000 <= info.linked_bytes < 1_300_000
        loaded = ckpt.load(2)
        assert loaded is not None and same(loaded.state, state)
        assert not same(loaded.state, ckpt.load(1).state)
