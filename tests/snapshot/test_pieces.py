"""A snapshot larger than the memory for it is staged and written in pieces: same checkpoint, same guarantees."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from stager import Checkpointer, MemoryBudgetError, SaveState, StorageError
from stager.snapshot.pieces import blobs_of, copies_of, cut
from stager.state.snapshot_plan import Planner
from stager.workers.checkpoint.directory.run_directory import list_checkpoints
from stager.workers.checkpoint.formats import get_format
from stager.workers.checkpoint.read.verify import verify_checkpoint
from tests.faults import Faults
from tests.observed import slab_nbytes
from tests.snapshot.staged import Bench
from tests.states import DTYPES, random_tensor, same

MIB = 1 << 20
SMALL_BUDGET = {"arena": {"max_host_bytes": 4 * MIB}, "staging": {"verify": True}}


def large_state(seed: int = 0) -> dict[str, Any]:
    """About 14 MiB: large, small, packed, tied, strided, empty, and objects; some lie across the pieces' borders."""
    generator = torch.Generator().manual_seed(seed)
    big = torch.randn(1200, 1000, generator=generator)
    return {
        "big": big,
        "tied": big,
        "transposed": torch.randn(600, 700, generator=generator).t(),
        "column": torch.randn(400_000, 3, generator=generator)[:, 1],
        "expanded": torch.randn(1, 1000, generator=generator).expand(700, 1000),
        "many": {str(i): random_tensor(d, (i, 31), generator) for i, d in enumerate(DTYPES)},
        "empty": torch.empty(0, 4),
        "text": "x" * 3 * MIB,
        "numbers": list(range(1000)),
        "z": torch.randn(50_000, dtype=torch.complex64, generator=generator).conj(),
    }


def test_pieces_cover_the_snapshot_once_and_fit(run_dir: Path) -> None:
    state = large_state()
    bench = Bench()
    bench.planner = Planner(get_format("dcp"), 2, 256 << 10, in_order=True)
    snapshot = bench.begin(state)
    pieces = cut(snapshot.plan, snapshot.blobs, 2 * MIB, 2)
    assert len(pieces.pieces) > 5 and pieces.slab_nbytes <= 2 * MIB
    covered = [0] * (pieces.items[-1].slab_offset + len(snapshot.blobs[-1]))
    for piece in pieces.pieces:
        stretches = [(c.slab_offset, c.nbytes) for c in copies_of(piece, snapshot.plan, snapshot.tree.leaves)[0]]
        stretches += [(offset, len(data)) for offset, data in blobs_of(piece, pieces.items, snapshot.blobs)]
        for offset, nbytes in stretches:
            assert offset >= 0 and offset + nbytes <= piece.nbytes
            for position in range(piece.start + offset, piece.start + offset + nbytes, 997):
                covered[position] += 1
    places = [(c.slab_offset, c.nbytes) for c in snapshot.plan.copies]
    places += [(item.slab_offset, item.nbytes) for item in pieces.items]
    for offset, nbytes in places:
        assert sum(covered[offset : offset + nbytes]) > 0
    bench.close()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("count", [1, 2])
def test_state_larger_than_the_budget_is_saved_in_pieces(run_dir: Path, count: int) -> None:
    with Checkpointer(run_dir, {**SMALL_BUDGET, "workers": {"count": count}}) as ckpt:
        for step in range(2):
            state = large_state(step)
            handle = ckpt.save(step, state)
            assert handle.staging_completion.done()
            info = handle.upload_completion.result()
            assert "in" in handle.report.notes[0] and "pieces" in handle.report.notes[0]
            assert slab_nbytes() <= 4 * MIB
            assert verify_checkpoint(info.path).ok
            loaded = ckpt.load(step)
            assert loaded is not None and same(loaded.state, state)
    stock = {"big": torch.zeros(1200, 1000), "many": {"5": torch.empty_like(state["many"]["5"])}}
    dcp.load(stock, checkpoint_id=info.path, no_dist=True)
    assert same(stock["big"], state["big"]) and same(stock["many"]["5"], state["many"]["5"])


def test_budget_too_small_for_even_a_piece_is_refused_with_the_numbers(run_dir: Path) -> None:
    with Checkpointer(run_dir, {"arena": {"max_host_bytes": 64 << 10}}) as ckpt:
        with pytest.raises(MemoryBudgetError, match=r"does not hold even one piece of 65,536 bytes") as raised:
            ckpt.save(0, large_state())
        assert ckpt.save(1, {"x": torch.ones(10)}).upload_completion.result().step == 1
    enough = re.search(r"raise arena\.max_host_bytes to (\d+) or more", str(raised.value))
    assert enough is not None
    with Checkpointer(run_dir, {"arena": {"max_host_bytes": int(enough[1])}}) as ckpt:
        assert ckpt.save(2, large_state()).upload_completion.result().step == 2


def test_worker_killed_between_pieces_is_replaced_and_the_save_commits(run_dir: Path, faults: Faults) -> None:
    faults.arm("part.written", "kill after=2")
    state = large_state()
    with Checkpointer(run_dir, SMALL_BUDGET) as ckpt:
        info = ckpt.save(0, state).upload_completion.result()
        loaded = ckpt.load(0)
    assert verify_checkpoint(info.path).ok and loaded is not None and same(loaded.state, state)


def test_full_disk_at_a_piece_fails_the_save_and_the_next_one_works(run_dir: Path, faults: Faults) -> None:
    faults.arm("part.write", "errno ENOSPC after=1")
    with Checkpointer(run_dir, SMALL_BUDGET) as ckpt:
        failed = ckpt.save(0, large_state())
        with pytest.raises(StorageError, match="No space left"):
            failed.upload_completion.result()
        assert failed.state is SaveState.FAILED
        state = large_state(1)
        ckpt.save(1, state).upload_completion.result()
        assert [name for name in os.listdir(run_dir) if name.startswith("step")] == ["step-00000001"]
        loaded = ckpt.load()
    assert loaded is not None and loaded.step == 1 and same(loaded.state, state)


def test_value_that_cannot_be_copied_midway_leaves_nothing_and_raises(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Checkpointer(run_dir, SMALL_BUDGET) as ckpt:
        copy, calls = ckpt._run.saver._taker.copy, []

        def fail_at_third(*args: Any, **kwargs: Any) -> None:
            calls.append(1)
            if len(calls) == 3:
                raise RuntimeError("CUDA error")
            copy(*args, **kwargs)

        monkeypatch.setattr(ckpt._run.saver._taker, "copy", fail_at_third)
        with pytest.raises(RuntimeError, match="CUDA error"):
            ckpt.save(0, large_state())
        state = large_state(2)
        assert ckpt.save(1, state).upload_completion.result().step == 1
    assert [info.step for info in list_checkpoints(str(run_dir))[0]] == [1]


def test_warmup_prepares_for_pieces(run_dir: Path) -> None:
    with Checkpointer(run_dir, SMALL_BUDGET) as ckpt:
        ckpt.warmup(large_state())
        before = slab_nbytes()
        assert 0 < before <= 4 * MIB
        ckpt.save(0, large_state()).upload_completion.result()
        assert slab_nbytes() == before


@pytest.mark.parametrize("spare", [1, 100, 2048, 4095, 4096])
def test_a_budget_of_hardly_more_than_a_segment_is_enough_or_refused(run_dir: Path, spare: int) -> None:
    """A piece may begin up to a block before its segment: parts that get ever smaller do not help there."""
    bench = Bench()
    bench.planner = Planner(get_format("dcp"), 2, 256 << 10, in_order=True)
    snapshot = bench.begin(
        {"big": torch.ones(300_001), "odd": torch.ones(3, dtype=torch.uint8), "end": torch.ones(99_999)}
    )
    plenty = cut(snapshot.plan, snapshot.blobs, 64 * MIB, 2)
    overhead = plenty.slab_nbytes - plenty.plan_offset
    try:
        pieces = cut(snapshot.plan, snapshot.blobs, overhead + snapshot.plan.layout.segment_bytes + spare, 2)
    except MemoryBudgetError:
        assert spare < 4096
    else:
        assert max(piece.nbytes for piece in pieces.pieces) <= snapshot.plan.layout.segment_bytes + spare
