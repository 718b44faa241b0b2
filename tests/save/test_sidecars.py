"""``save(files=...)``: small files that are committed, hashed, verified and removed with the checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from stager import ArgumentError, Checkpointer, CorruptCheckpointError, PruneFate, StorageError, load_checkpoint, verify
from tests.faults import Faults
from tests.ranks.bodies import CONFIG
from tests.staging.ranks import run_ranks


def config(**more: Any) -> dict[str, Any]:
    return {"workers": {"count": 2}, "persistence": {"fsync": False}, **more}


def test_bytes_and_files_are_there_and_are_what_they_were_when_save_was_called(run_dir: Path, tmp_path: Path) -> None:
    source = tmp_path / "config.json"
    source.write_bytes(b'{"layers": 2}')
    blob = bytearray(b"first")
    with Checkpointer(run_dir, config()) as ckpt:
        files = {"config.json": source, "note.txt": blob, "empty": b"", "größe.bin": memoryview(b"\0" * 70_000)}
        handle = ckpt.save(1, {"x": torch.ones(9)}, files=files)
        source.write_bytes(b"changed")
        blob[:] = b"after"
        info = handle.upload_completion.result()
        assert info.files == ("config.json", "empty", "größe.bin", "note.txt")
        loaded = ckpt.load()
        assert dict(loaded.files) == {
            "config.json": b'{"layers": 2}',
            "note.txt": b"first",
            "empty": b"",
            "größe.bin": b"\0" * 70_000,
        }
    path = Path(info.path)
    assert (path / "config.json").read_bytes() == b'{"layers": 2}'
    assert verify(path).ok and not verify(path, strict=True).strangers
    assert dict(load_checkpoint(path).files) == dict(loaded.files)


@pytest.mark.parametrize("file_format", ["dcp", "torch", "safetensors"])
def test_every_format_has_them_and_they_go_with_the_checkpoint(run_dir: Path, file_format: str) -> None:
    settings = config(persistence={"fsync": False, "format": file_format}, retention={"keep_latest": 1})
    with Checkpointer(run_dir, settings) as ckpt:
        for step in (1, 2, 3):
            ckpt.save(step, {"x": torch.ones(9)}, files={"state.txt": str(step).encode()}).upload_completion.result()
    assert sorted(os.listdir(run_dir)) == [".stager.lock", "step-00000003"]


@pytest.mark.parametrize("change", ["flip", "cut", "grow", "remove"])
def test_damage_to_one_is_found(run_dir: Path, change: str) -> None:
    with Checkpointer(run_dir, config()) as ckpt:
        ckpt.save(1, {"x": torch.ones(9)}, files={"a.json": b"0123456789"}).upload_completion.result()
    file = run_dir / "step-00000001" / "a.json"
    if change == "remove":
        file.unlink()
    else:
        file.write_bytes({"flip": b"0123x56789", "cut": b"0123", "grow": b"0123456789\n"}[change])
    report = verify(run_dir / "step-00000001")
    assert not report.ok and "a.json" in report.problems[0]
    with Checkpointer(run_dir, read_only=True) as ckpt:
        with pytest.raises(CorruptCheckpointError, match=r"a\.json"):
            ckpt.load(1)
    if change != "remove":
        with pytest.raises(CorruptCheckpointError, match=r"a\.json"):
            load_checkpoint(run_dir / "step-00000001").files["a.json"]


@pytest.mark.parametrize("later", [{"a.json": b"of the second"}, {}], ids=["other bytes", "without it"])
def test_those_of_a_checkpoint_that_was_replaced_meanwhile(run_dir: Path, later: dict[str, bytes]) -> None:
    with Checkpointer(run_dir, config()) as ckpt:
        ckpt.save(1, {"x": torch.ones(9)}, files={"a.json": b"of the first"}).upload_completion.result()
        loaded = ckpt.load(1)
        assert loaded is not None
        ckpt.save(1, {"x": torch.zeros(9)}, files=later).upload_completion.result()
        with pytest.raises(StorageError, match=r"another save has replaced this checkpoint.*load it again"):
            loaded.files["a.json"]
        again = ckpt.load(1)
        assert again is not None and dict(again.files) == later


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({"a/b": b""}, "without /"),
        ({"": b""}, "without /"),
        ({"..": b""}, "without /"),
        ({3: b""}, "without /"),
        ({"manifest.json": b""}, "a file of its own"),
        ({".metadata": b""}, "a file of its own"),
        ({"__0_0.distcp": b""}, "a file of its own"),
        ({"receipt-0-0-of-2.json": b""}, "a file of its own"),
        ({"x" * 250: b""}, "at most 240 bytes"),
        ({"a": 3}, "must be bytes, or the path"),
        ({"a": torch.ones(1)}, "must be bytes, or the path"),
        ([("a", b"")], "must be a mapping"),
    ],
)
def test_what_cannot_be_meant_is_refused_and_nothing_is_lost(run_dir: Path, files: Any, why: str) -> None:
    with Checkpointer(run_dir, config()) as ckpt:
        with pytest.raises(ArgumentError, match=why):
            ckpt.save(1, {"x": torch.ones(1)}, files=files)
        assert ckpt.save(2, {"x": torch.ones(1)}).upload_completion.result().step == 2


def test_a_file_that_is_missing_is_named(run_dir: Path, tmp_path: Path) -> None:
    with Checkpointer(run_dir, config()) as ckpt:
        with pytest.raises(StorageError, match=r"nowhere\.json"):
            ckpt.save(1, {"x": torch.ones(1)}, files={"a": tmp_path / "nowhere.json"})
        assert ckpt.checkpoints() == []


def test_they_are_saved_with_a_snapshot_in_pieces_and_with_a_growing_one(run_dir: Path) -> None:
    """Files grow from save to save, past what the slab of the first one has room for."""
    with Checkpointer(run_dir, config(arena={"max_host_bytes": "8MiB"})) as ckpt:
        ckpt.save(1, {"x": torch.ones(3 << 20)}, files={"a": b"1" * 100_000}).upload_completion.result()
    assert (run_dir / "step-00000001" / "a").read_bytes() == b"1" * 100_000
    with Checkpointer(run_dir, config()) as ckpt:
        for step in range(2, 8):
            data = bytes([step]) * (1000 << (2 * step))
            ckpt.save(step, {"x": torch.ones(9), "o": "text"}, files={"a": data}).upload_completion.result()
            assert ckpt.load(step).files["a"] == data


def test_a_removal_that_is_killed_is_finished_and_leaves_none_of_them(run_dir: Path, faults: Faults) -> None:
    for after in range(4):
        with Checkpointer(run_dir, config(workers={"count": 1})) as ckpt:
            ckpt.save(1, {"x": torch.ones(9)}, files={"a": b"1", "z": b"2"}).upload_completion.result()
            faults.arm("prune.removing", f"kill after={after}")
            ckpt.delete(1)  # the worker is replaced, and the task begins again, or finds nothing
            with Checkpointer(run_dir, read_only=True) as looking:
                assert looking.checkpoints() == []
        Checkpointer(run_dir, config()).close()  # finishes what is left
        assert os.listdir(run_dir) == [".stager.lock"], after


def test_a_crash_after_the_receipts_commits_them_too(run_dir: Path, faults: Faults) -> None:
    faults.arm("commit.begin", "errno EIO")
    with Checkpointer(run_dir, config(persistence={"fsync": False, "on_save_error": "warn"})) as ckpt:
        ckpt.save(1, {"x": torch.ones(9)}, files={"a": b"1"})
    assert not [name for name in os.listdir(run_dir) if "partial" in name]


def test_of_several_ranks_those_of_rank_0_are_kept(tmp_path: Path) -> None:
    assert CONFIG  # the ranks use it
    results = run_ranks("tests.ranks.bodies:save_files", 2, tmp_path)
    assert results == [{"who": "0"}, {"who": "0"}]


def test_prune_keeps_the_strangers_beside_them(run_dir: Path) -> None:
    with Checkpointer(run_dir, config()) as ckpt:
        ckpt.save(1, {"x": torch.ones(9)}, files={"a": b"1"}).upload_completion.result()
        (run_dir / "step-00000001" / "mine.txt").write_text("keep")
        report = ckpt.delete(1)
    assert report.steps(PruneFate.REMOVED) == [1]
    (left,) = [path for path in run_dir.iterdir() if path.is_dir()]
    assert [path.name for path in left.iterdir()] == ["mine.txt"]
