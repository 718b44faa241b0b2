"""Small items as one write: in every mixture with large ones the same bytes and hashes as piece by piece."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
import torch

from stager.workers.checkpoint.directory.run_directory import read_checkpoint
from stager.workers.checkpoint.layout.layout import Segment, partition, partition_once, segments
from stager.workers.checkpoint.read.verify import verify_checkpoint
from stager.workers.checkpoint.write import part_writer
from stager.workers.checkpoint.write.part_writer import runs_of
from stager.workers.checkpoint.write.write_task import read_layout
from tests.persistence.tasks import load, make_task, run
from tests.states import same


def mixture(seed: int) -> dict[str, object]:
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    lengths = [0, 1, 3, 250, 4000, 20_000, 90_000]
    state: dict[str, object] = {f"t{i}": torch.randn(rng.choice(lengths), generator=generator) for i in range(60)}
    return {**state, "objects": "x" * rng.choice([1, 100_000]), "n": seed}


@pytest.mark.parametrize("seed", range(4))
def test_files_are_the_same_with_and_without_runs(
    run_dir: Path, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = []
    for name, small_bytes, run_bytes in (("runs", 64 << 10, 2 << 20), ("short", 3000, 7000), ("none", -1, 0)):
        monkeypatch.setattr(part_writer, "_SMALL_BYTES", small_bytes)
        monkeypatch.setattr(part_writer, "_RUN_BYTES", run_bytes)
        (tmp_path / name).mkdir()
        for _ in range(2):  # the second from what was kept
            task = make_task(
                tmp_path / name, mixture(seed), num_parts=3, num_files=2, segment_bytes=70_000, fsync=False
            )
            info = run(task).info
            assert verify_checkpoint(info.path).problems == ()
            assert same(load(info), mixture(seed))
        manifest = read_checkpoint(str(tmp_path / name), 1)[1]
        files = {path.name: path.read_bytes() for path in Path(info.path).glob("*.distcp")}
        contents.append((files, manifest.hashes, manifest.layout.items))
    assert contents[0] == contents[1] == contents[2]


@pytest.mark.parametrize("seed", range(4))
def test_runs_are_the_segments_in_order_and_tile(run_dir: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part_writer, "_RUN_BYTES", 30_000)
    layout = read_layout(make_task(run_dir, mixture(seed), num_files=3, segment_bytes=50_000))
    every = list(segments(layout))
    found = list(runs_of(layout, every))
    assert [segment for run in found for segment in run.segments] == every
    assert any(run.is_small and len(run.segments) > 1 for run in found)
    for file, is_small, part, nbytes in found:
        assert nbytes == sum(segment.end - segment.start for segment in part)
        assert {layout.items[segment.index].file for segment in part} == {file}
        if is_small:
            assert all(a.end == b.start for a, b in itertools.pairwise(part))
            assert all(is_whole(layout.ends(), layout.items[s.index].offset, s) for s in part)
            assert len(part) == 1 or part[-1].end - part[0].start <= 30_000


def is_whole(ends: list[int], offset: int, segment: Segment) -> bool:
    return (segment.start, segment.end) == (offset, ends[segment.index])


def test_parts_are_dealt_anew_when_an_object_grows(run_dir: Path) -> None:
    first = read_layout(make_task(run_dir, {"a": torch.ones(1000), "text": "short"}))
    second = read_layout(make_task(run_dir, {"a": torch.ones(1000), "text": "long " * 5000}))
    assert second.cache is first.cache
    for layout in (first, second, first):
        assert partition_once(layout, 2) == partition(layout, 2)
        assert layout.ends() == [end for _, _, end in layout.spans()]
    assert partition(first, 2) != partition(second, 2)
