"""What an untrusted checkpoint may cost: no more time and memory than its files are long. And who can see a snapshot."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from stager import Checkpointer, CorruptCheckpointError, StorageError
from stager.cli.ls import format_time
from stager.config import LoadingConfig
from stager.loading.loader import Loader
from stager.loading.place import Run
from stager.loading.restore import Restorer
from stager.workers.checkpoint.commit.commit import partial_path
from stager.workers.checkpoint.commit.persist import persist_part
from stager.workers.checkpoint.directory.manifest_file import read_manifest
from stager.workers.checkpoint.directory.run_directory import read_checkpoint
from stager.workers.checkpoint.documents.envelope import seal, unseal
from stager.workers.checkpoint.documents.manifest import parse_manifest
from stager.workers.checkpoint.layout.layout_check import _tile
from stager.workers.checkpoint.maintenance.recover import RecoverOutcome, recover
from stager.workers.checkpoint.storage.posix.files import read_small
from stager.workers.memory.slab import Slab
from tests import scripts
from tests.persistence.tasks import make_task, restorer, save

STATE = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(6.0).reshape(2, 3), "e": torch.empty(0), "o": "object"}


def rewrite(path: Path, **changes: Any) -> bytes:
    """Change a sealed document, and seal it again."""
    path.write_bytes(seal({**unseal(path.read_bytes(), ""), **changes}))
    return path.read_bytes()


def test_shape_of_a_hundred_thousand_dimensions_is_not_multiplied(run_dir: Path) -> None:
    path = Path(save(run_dir, STATE).path) / "manifest.json"
    rows = unseal(path.read_bytes(), "")["rows"]
    empty = next(row for row in rows if row[7] == [0])
    for lengths in ([(1 << 62) + 1] * 100_000, [1] * 257):
        empty[7], empty[8] = [0, *lengths], [1] * (len(lengths) + 1)
        with pytest.raises(CorruptCheckpointError, match="dimensions; at most"):
            parse_manifest(rewrite(path, rows=rows), str(path))


def test_chunks_that_overlap_are_refused(run_dir: Path) -> None:
    """As many elements as the whole has, and half of it is not there."""
    path = Path(save(run_dir, STATE).path) / "manifest.json"
    keys = ["z", "e", "o"]
    for offsets, fits in (([2, 0], True), ([0, 0], False), ([1, 0], False)):
        chunks = ["chunks", [4, 3], [[[0, 0], 0], [offsets, 1]]]
        data = rewrite(path, structure=["dict", keys, [chunks, 2, 3]])
        if fits:
            parse_manifest(data, str(path))
        else:
            with pytest.raises(CorruptCheckpointError, match="overlap"):
                parse_manifest(data, str(path))


def test_tensor_of_one_chunk_again_and_again_is_refused(run_dir: Path) -> None:
    """Each whole takes memory: a row of the manifest is short, and its tensor is not. Tied ones are one."""
    path = Path(save(run_dir, STATE).path) / "manifest.json"
    rest = [["e", "o"], [2, 3]]
    whole = ["chunks", [4, 3], [[[0, 0], 0], [[2, 0], 1]]]
    many = rewrite(path, structure=["dict", [f"z{n}" for n in range(99)] + rest[0], [whole] * 99 + rest[1]])
    parse_manifest(many, str(path))
    loaded = Restorer(str(path.parent), read_manifest(path.parent), 1, allow_pickle=False).load()
    assert loaded["z0"].data_ptr() == loaded["z98"].data_ptr() and torch.equal(
        loaded["z0"], torch.cat((STATE["a"], STATE["b"]))
    )
    again = [["chunks", [2 * 99, 3], [[[2 * n, 0], 0] for n in range(99)]]]
    shapes = {(4, 3): [2, 0], (2, 6): [0, 3]}
    pairs = [["chunks", [*shape], [[[0, 0], n], [at, 1 - n]]] for shape, at in shapes.items() for n in (0, 1)]
    alone = [["chunks", [2, 3], [[[0, 0], 0]]]]
    for nodes in (again, pairs + alone):
        data = rewrite(path, structure=["dict", [*map(str, range(len(nodes))), "b", *rest[0]], [*nodes, 1, *rest[1]]])
        with pytest.raises(CorruptCheckpointError, match="too many tensors"):
            parse_manifest(data, str(path))


def test_chunks_along_very_many_dimensions_are_refused_before_their_corners_are_counted() -> None:
    shape = (2,) * 40
    boxes = [((n % 2,) * 40, (1,) * 40) for n in range(4)] + [((0,) * 40, (1,) * 20 + (2,) * 20)]
    with pytest.raises(ValueError, match="5 chunks along 40 dimensions, which are too many"):
        _tile(boxes, shape)


def test_tiling_is_told_from_everything_else_of_the_same_volume() -> None:
    """Compared with counting each element."""
    rng, tilings = random.Random(3), 0
    for _ in range(3000):
        shape = tuple(rng.randint(1, 4) for _ in range(rng.randint(1, 3)))
        boxes = _cut(rng, shape)
        if rng.random() < 0.5:
            number = rng.randrange(len(boxes))
            lengths = boxes[number][1]
            boxes[number] = (tuple(rng.randint(0, w - n) for w, n in zip(shape, lengths, strict=True)), lengths)
        covered = [
            place
            for offsets, lengths in boxes
            for place in itertools.product(*(range(o, o + n) for o, n in zip(offsets, lengths, strict=True)))
        ]
        expected = len(set(covered)) == len(covered)
        assert _tile(boxes, shape) == expected, (shape, boxes)
        tilings += expected
    assert 1500 < tilings < 2900


def _cut(rng: random.Random, shape: tuple[int, ...]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    boxes = [((0,) * len(shape), shape)]
    for _ in range(rng.randint(0, 4)):
        offsets, lengths = boxes.pop(rng.randrange(len(boxes)))
        dim = rng.randrange(len(shape))
        first = rng.randint(0, lengths[dim])
        for start, length in ((0, first), (first, lengths[dim] - first)):
            at, size = list(offsets), list(lengths)
            at[dim], size[dim] = offsets[dim] + start, length
            boxes.append((tuple(at), tuple(size)))
    return boxes


def test_record_of_a_million_billion_segments_is_removed_without_counting_them(run_dir: Path) -> None:
    run_dir.mkdir()
    job = make_task(run_dir, {"a": torch.zeros(100)}, num_parts=2)
    persist_part(job, 0)
    partial = Path(partial_path(job.spec))
    body = unseal((partial / "save-0.json").read_bytes(), "")
    body["plan"]["files"][0][1] = 1 << 50  # padding behind the only item
    body["plan"]["segment_bytes"] = 1
    (partial / "save-0.json").write_bytes(seal(body))
    receipt = unseal((partial / "receipt-0-0-of-2.json").read_bytes(), "")
    (partial / "receipt-0-1-of-2.json").write_bytes(seal({**receipt, "part": 1}))
    (found,) = recover(str(run_dir))
    assert found.outcome is RecoverOutcome.REMOVED and f"the rank wrote {1 << 50} segments" in found.reason


@pytest.mark.parametrize("name", ["manifest.json", ".metadata"])
def test_file_that_is_nearly_all_hole_is_not_read(run_dir: Path, name: str) -> None:
    """700 MiB by its length, a few KiB on the disk."""
    path = Path(save(run_dir, STATE).path) / name
    os.truncate(path, 700 << 20)
    with pytest.raises(CorruptCheckpointError, match="hole"):
        read_small(str(path))


def test_tensor_of_a_terabyte_that_is_not_there_takes_no_memory(run_dir: Path) -> None:
    """The length of its file is right; the disk holds a few KiB of it."""
    info = save(run_dir, {"a": torch.zeros(256, dtype=torch.uint8), "o": 1}, num_files=1)
    path = Path(info.path)
    body = unseal((path / "manifest.json").read_bytes(), "")
    row, more = body["rows"][0], (1 << 40) - 256
    row[3], row[5], row[7] = row[3] + more, row[5] + more, [1 << 40]
    body["files"][0][1] += more
    row[9] = ["00" * 16] * -(-body["files"][0][1] // body["segment_bytes"])
    (path / "manifest.json").write_bytes(seal(body))
    os.truncate(path / body["files"][0][0], body["files"][0][1])
    with pytest.raises((StorageError, CorruptCheckpointError), match=r"cannot allocate the 1,099,511,627,776|damaged"):
        Restorer(str(path), read_manifest(path), 1, allow_pickle=False).load()


def test_date_beyond_the_calendar_is_still_listed() -> None:
    for unix in (1e300, -1e300, 1e12, float(1 << 63)):
        assert format_time(unix)
    assert format_time(0) == ""


def test_newest_checkpoint_that_the_disk_does_not_give_is_passed_over(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(run_dir, STATE, step=1)
    broken = save(run_dir, STATE, step=2).path
    listdir = os.listdir

    def failing(path: Any = ".") -> list[str]:
        if path == broken:
            raise OSError(5, "Input/output error", path)
        names: list[str] = listdir(path)
        return names

    monkeypatch.setattr(os, "listdir", failing)
    loader = Loader(Run(str(run_dir)), LoadingConfig())
    latest = loader.latest()
    assert latest is not None and latest.step == 1
    assert [skipped.name for skipped in loader.skipped] == ["step-00000002"] and "dmesg" in loader.skipped[0].reason
    monkeypatch.undo()
    assert restorer(read_checkpoint(str(run_dir), 2)[0]).load()["o"] == "object"


def test_snapshot_is_private_to_the_user() -> None:
    slab = Slab.create(4096)
    assert os.fstat(slab.fd).st_mode & 0o777 == 0o600
    path = f"/proc/{os.getpid()}/fd/{slab.fd}"
    assert subprocess.run(["head", "-c1", path], capture_output=True, check=False).returncode == 0
    if os.geteuid() == 0:
        other = subprocess.run(["head", "-c1", path], capture_output=True, check=False, user=65534, group=65534)
        assert other.returncode != 0 and b"ermission denied" in other.stderr


_SAVE = """
import os, sys, torch
from stager import Checkpointer
os.umask(int(sys.argv[2], 8))
with Checkpointer(sys.argv[1], {"workers": {"count": 1}}) as ckpt:
    ckpt.save(1, {"x": torch.ones(10), "o": 1}).upload_completion.result()
"""


def test_files_that_workers_write_follow_the_umask(run_dir: Path) -> None:
    assert scripts.run(_SAVE, run_dir, "037").returncode == 0
    modes = {path: path.stat().st_mode & 0o777 for path in (run_dir, *run_dir.rglob("*"))}
    assert {mode for path, mode in modes.items() if path.is_file()} == {0o640}
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o740}
    with Checkpointer(run_dir, read_only=True) as reader:
        assert reader.latest() is not None
