"""The workspace of a demo whose checkpoints are in an object store. The demo itself: see docs/object-stores.md."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader

from stager import Checkpointer
from stager.demo import DemoConfig
from stager.demo.runner import has_partial
from stager.demo.workspace import CHECKPOINTS_KEPT, Workspace
from stager.workers.checkpoint.directory.run_directory import committed_steps
from stager.workers.checkpoint.storage.places import storage_of
from tests.object_stores.test_checkpointer import LEFT, objects


def test_checkpoints_of_a_demo_in_an_object_store(run_url: str, tmp_path: Path) -> None:
    workspace = Workspace.prepare(tmp_path / "demo", DemoConfig(), run_url)
    with Checkpointer(workspace.checkpoints) as ckpt:
        for step in range(1, 6):
            ckpt.save(step, {"x": torch.full((100,), float(step))})
    with storage_of(workspace.checkpoints).create(f"{workspace.checkpoints}/step-00000009.partial-0123abcd") as begun:
        begun.put("save-0.json", b"", sync=False)
    assert has_partial(workspace.checkpoints, 9) and not has_partial(workspace.checkpoints, 5)
    copy = workspace.copy_here("step-00000002", tmp_path / "copied")
    assert "x" in FileSystemReader(copy).read_metadata().state_dict_metadata
    workspace.remove_old_checkpoints()
    assert committed_steps(workspace.checkpoints) == [5, 4, 3][:CHECKPOINTS_KEPT]
    again = Workspace.prepare(tmp_path / "demo", DemoConfig(), run_url)
    assert committed_steps(again.checkpoints) == []
    assert [key for key in objects(again.checkpoints) if key != ".stager.lock"] == []
    assert not any(map(LEFT.search, objects(again.checkpoints)))
