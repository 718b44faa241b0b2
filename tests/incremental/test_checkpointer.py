"""Incremental saves by real workers: how much is written, who reads it, and what faults do to it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from stager import Checkpointer
from stager.workers.checkpoint.read.verify import verify_checkpoint
from tests.faults import Faults
from tests.states import same

CONFIG: dict[str, Any] = {"workers": {"count": 1}, "persistence": {"incremental": True, "fsync": False}}


def lora(value: float) -> dict[str, Any]:
    """16 frozen layers of 1 MiB with an adapter each, interleaved: 1 % of the bytes depends on ``value``."""
    layers = {
        f"layer{i}": {
            "weight": torch.full((512, 512), float(i)),
            "lora": torch.full((2650,), value),
            "n": torch.ones(8),
        }
        for i in range(16)
    }
    return {"model": layers, "step": int(value)}


def _stays(path: str) -> int:
    """Bytes of the checkpoint's files that no other has."""
    stats = [entry.stat() for entry in Path(path).iterdir()]
    return sum(stat.st_size for stat in stats if stat.st_nlink == 1)


READ_BY_STOCK = """
import sys, torch, warnings
import torch.distributed.checkpoint as dcp
warnings.simplefilter("ignore")
layer = lambda: {"weight": torch.zeros(512, 512), "lora": torch.zeros(2650), "n": torch.zeros(8)}
state = {"model": {f"layer{i}": layer() for i in range(16)}, "step": 0}
dcp.load(state, checkpoint_id=sys.argv[1], no_dist=True)
assert not {"stager", "workers"} & set(sys.modules)
assert state["step"] == 2
for i in range(16):
    got = state["model"][f"layer{i}"]
    assert (got["weight"] == i).all() and (got["lora"] == 2).all() and (got["n"] == 1).all()
"""


def test_frozen_state_writes_2_percent_and_stock_reads_it_after_the_first_is_deleted(run_dir: Path) -> None:
    with Checkpointer(run_dir, {"persistence": {"incremental": True}}) as ckpt:
        first = ckpt.save(1, lora(1.0))
        first_path = first.upload_completion.result().path
        second = ckpt.save(2, lora(2.0))
        info = second.upload_completion.result()
        total = info.nbytes
        assert (first.report.linked_bytes, first.report.written_bytes) == (0, total)
        written, linked = second.report.written_bytes, second.report.linked_bytes
        assert written is not None and linked is not None and written + linked == total
        assert written <= 0.02 * total and _stays(info.path) <= 0.02 * total
        assert second.report.notes == ()
    shutil.rmtree(first_path)
    assert verify_checkpoint(info.path).ok
    subprocess.run([sys.executable, "-c", READ_BY_STOCK, info.path], check=True)


@pytest.mark.parametrize(
    "point",
    ["link.linked"]
    + [
        pytest.param(point, marks=pytest.mark.long)
        for point in ("link.begin", "part.written", "part.synced", "part.receipt", "commit.manifest")
    ],
)
def test_worker_killed_at_each_point_of_linking_and_the_save_commits(run_dir: Path, faults: Faults, point: str) -> None:
    with Checkpointer(run_dir, {**CONFIG, "workers": {"count": 2}}) as ckpt:
        ckpt.save(1, lora(1.0)).upload_completion.result()
        faults.arm(point, "kill")
        info = ckpt.save(2, lora(2.0)).upload_completion.result()
        assert faults.fired(point)
        assert info.linked_bytes > 0.9 * info.nbytes
        for step in (1, 2):
            assert verify_checkpoint(run_dir / f"step-{step:08d}").problems == ()
            loaded = ckpt.load(step)
            assert loaded is not None and same(loaded.state, lora(float(step)))


def test_base_removed_while_a_worker_links(run_dir: Path, faults: Faults) -> None:
    with Checkpointer(run_dir, CONFIG) as ckpt:
        base = ckpt.save(1, lora(1.0)).upload_completion.result()
        hold = faults.hold("link.linked")
        handle = ckpt.save(2, lora(2.0))
        hold.wait()
        shutil.rmtree(base.path)
        hold.release()
        info = handle.upload_completion.result()
        assert 0 < info.linked_bytes < 0.9 * info.nbytes
        assert handle.report.notes == ("written although unchanged: step-00000001 was removed meanwhile",)
        assert verify_checkpoint(info.path).ok


def test_first_save_of_a_run_links_to_what_was_loaded(run_dir: Path) -> None:
    with Checkpointer(run_dir, CONFIG) as ckpt:
        ckpt.save(1, lora(1.0))
        ckpt.save(2, lora(2.0))
    with Checkpointer(run_dir, CONFIG) as ckpt:
        assert ckpt.save(3, lora(3.0)).upload_completion.result().linked_bytes == 0  # nothing here is known to be whole
    with Checkpointer(run_dir, CONFIG) as ckpt:
        state = lora(0.0)
        assert ckpt.load(2, into=state) is not None
        info = ckpt.save(4, lora(4.0)).upload_completion.result()
        assert info.linked_bytes > 0.9 * info.nbytes
        assert (Path(info.path) / "__0_0.distcp").samefile(run_dir / "step-00000002" / "__0_0.distcp")
    with Checkpointer(run_dir, CONFIG) as ckpt:
        assert (
            ckpt.load(4, into={"model": lora(0.0)["model"]}) is not None
        )  # and not the rest: what of it may be rotten
        assert ckpt.save(5, lora(5.0)).upload_completion.result().linked_bytes == 0


def test_damage_that_is_found_is_not_linked_to(run_dir: Path) -> None:
    """What latest() passes over is forgotten as a base, although nothing but its bytes tells that it is damaged."""
    with Checkpointer(run_dir, CONFIG) as ckpt:
        info = ckpt.save(1, lora(1.0)).upload_completion.result()
        manifest_time = (Path(info.path) / "manifest.json").stat().st_mtime_ns
        for path in Path(info.path).glob("__0_?.distcp"):
            _rot(path, manifest_time)
        assert ckpt.latest() is None
        second = ckpt.save(2, lora(2.0)).upload_completion.result()
        assert second.linked_bytes == 0 and verify_checkpoint(second.path).ok


def _rot(path: Path, mtime_ns: int) -> None:
    """A bit changes on the disk, and no time of the file tells."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    with open(path, "r+b") as file:
        file.write(data)
    os.utime(path, ns=(mtime_ns, mtime_ns))


def test_state_larger_than_the_memory_for_it_is_linked_piece_by_piece(run_dir: Path) -> None:
    config = {**CONFIG, "arena": {"max_host_bytes": "12MiB"}}
    with Checkpointer(run_dir, config) as ckpt:
        ckpt.save(1, lora(1.0)).upload_completion.result()
        handle = ckpt.save(2, lora(2.0))
        info = handle.upload_completion.result()
        assert handle.report.notes[0].startswith("staged in ")
        assert info.linked_bytes > 0.25 * info.nbytes  # files that no piece's end cuts
        loaded = ckpt.load(2)
        assert loaded is not None and same(loaded.state, lora(2.0)) and verify_checkpoint(info.path).ok


@pytest.mark.parametrize("incremental", [True, pytest.param(False, marks=pytest.mark.long)])
def test_saves_in_flight_at_once_link_to_the_last_that_is_committed(run_dir: Path, incremental: bool) -> None:
    config = {**CONFIG, "persistence": {"incremental": incremental, "fsync": False}}
    with Checkpointer(run_dir, config) as ckpt:
        ckpt.save(0, lora(0.0)).upload_completion.result()
        handles = [ckpt.save(step, lora(float(step))) for step in range(1, 6)]
        infos = [handle.upload_completion.result() for handle in handles]
        assert all((info.linked_bytes > 0) == incremental for info in infos)
        assert all(verify_checkpoint(info.path).ok for info in infos)
