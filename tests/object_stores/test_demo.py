"""The demo, whose checkpoints are in an object store: as a user starts it, on one rank and on two; and its workspace."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.distributed.checkpoint import FileSystemReader

from stager import Checkpointer
from stager.demo import DemoConfig
from stager.demo.runner import has_partial
from stager.demo.workspace import CHECKPOINTS_KEPT, Workspace
from stager.workers.checkpoint.directory.run_directory import committed_steps
from stager.workers.checkpoint.storage.places import storage_of
from tests import forked_subprocess, prepared_workers
from tests.demo.conftest import TINY, TINY_ON_RANKS
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


def _report(tmp_path: Path, launcher: list[str], settings: dict[str, Any], run_url: str) -> dict[str, Any]:
    (tmp_path / "demo.yaml").write_text(yaml.safe_dump({"demo": settings}))
    command = [
        sys.executable,
        "-m",
        *launcher,
        "stager",
        "demo",
        "--config",
        str(tmp_path / "demo.yaml"),
        "--out",
        run_url,
    ]
    environment = {**os.environ, forked_subprocess.LAUNCHES: "1", prepared_workers.FRESH: "1"}
    done = forked_subprocess.run(command, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (report,) = tmp_path.glob("runs/*/results.json")
    found: dict[str, Any] = json.loads(report.read_text())
    return found


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_it_is_killed_twice_and_resumes_bit_for_bit(run_url: str, tmp_path: Path, num_ranks: int) -> None:
    launcher, settings = list[str](), TINY | {"steps": 80, "save_every": 10}
    if num_ranks > 1:
        options = ["--standalone", "--local-addr", "127.0.0.1", "--log-dir", os.devnull, "--nproc-per-node", "2", "-m"]
        launcher, settings = ["torch.distributed.run", *options], TINY_ON_RANKS
    found = _report(tmp_path, launcher, settings, run_url)
    assert found["ok"] is True and [check for check in found["checks"] if not check["ok"]] == []
    assert {kill["aim"] for kill in found["kills"]} == {"staging", "writing"}
