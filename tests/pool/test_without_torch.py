"""Workers start, and save, without torch: importing it takes them longer and more memory than all the rest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from stager import Checkpointer
from stager.workers import WorkerPool
from stager.workers.checkpoint.formats import FORMATS
from stager.workers.checkpoint.layout.dtypes import dtype_of
from stager.workers.checkpoint.layout.layout import SIZES
from stager.workers.checkpoint.read.verify import verify_checkpoint
from tests.observed import child_pids
from tests.pool import tasks
from tests.states import everything, same

HEAVY = {"torch", "numpy", "pydantic", "yaml", "rich", "typer"}
MOST_PRIVATE_BYTES = 40 << 20  # with torch it is 150 MiB


def private_bytes(pid: int) -> int:
    """Without shared mappings: the slab, and files."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    fields = {line.split()[0]: int(line.split()[1]) << 10 for line in lines[1:]}
    return fields["Anonymous:"]


def libraries(pid: int) -> set[str]:
    return {Path(line.split()[-1]).name for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if ".so" in line}


@pytest.mark.parametrize("location", ["trainer", "workers"])
@pytest.mark.parametrize("kind", FORMATS)
def test_workers_save_every_kind_of_state_without_torch(run_dir: Path, kind: str, location: str) -> None:
    """Also where they copy from shared memory, where a checkpoint of the step is replaced, and where one is removed."""
    large = torch.nn.Linear(600, 600)
    optimizer = torch.optim.AdamW(large.parameters())
    state = {"everything": everything(), "model": large, "optimizer": optimizer}
    config: dict[str, Any] = {
        "workers": {"count": 2},
        "staging": {"location": location, "share_min_bytes": "64KiB"},
        "persistence": {"format": kind, "fsync": False},
        "retention": {"keep_latest": 1, "verify": "quick"},
    }
    others = set(child_pids())  # the workers that this folder's tests share
    with Checkpointer(run_dir, config) as ckpt:
        ckpt.guard(optimizer)
        pids = set(child_pids()) - others
        assert len(pids) == 2
        for step in (1, 1, 2):
            large(torch.ones(600)).sum().backward()
            optimizer.step()
            info = ckpt.save(step, state).upload_completion.result()
        names = ckpt._run.pool.submit(tasks.imported).result()
        assert not names & HEAVY and "stager.workers.checkpoint.commit.persist" in names
        assert set(child_pids()) - others == pids
        for pid in pids:
            assert not [name for name in libraries(pid) if name.startswith(("libtorch", "_C", "_multiarray"))]
            assert private_bytes(pid) < MOST_PRIVATE_BYTES
        assert verify_checkpoint(info.path).ok
        loaded = ckpt.load(2, allow_pickle=True)
        assert loaded is not None and same(loaded.state["model"], dict(large.state_dict()))


def test_what_workers_import_does_not_import_torch() -> None:
    program = (
        "import sys, stager.workers.checkpoint.commit.persist, stager.workers.checkpoint.maintenance.recover\n"
        "import stager.workers.memory.shared_source, stager.workers.pool.worker_loop\n"
        "import stager.workers.checkpoint.read.verify\n"
        f"print(sorted(set(sys.modules) & {HEAVY!r}))"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def threads_of_torch() -> int:
    import torch

    return torch.get_num_threads()


def test_torch_that_a_task_imports_has_one_thread() -> None:
    with WorkerPool(count=1) as pool:
        assert "torch" not in pool.submit(tasks.imported).result()
        assert pool.submit(threads_of_torch).result() == 1


def doubled(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.share_memory_().mul_(2)


def test_tensors_are_shared_with_a_worker_that_had_no_torch_before() -> None:
    """It comes with the first message that names it; the result, too, is in shared memory."""
    tensor = torch.ones(1000)
    with WorkerPool(count=1) as pool:
        result = pool.submit(doubled, tensor).result()
        assert result.is_shared() and torch.equal(result, torch.full((1000,), 2.0)) and torch.equal(tensor, result)


def test_sizes_of_dtypes_are_torchs() -> None:
    assert {name: dtype_of(name).itemsize for name in SIZES} == SIZES
